"""A grammar of attention programs: spellings x scores x masks x layouts x uses.

`programs()` draws one; `Program.mutant` says what was done to make it no attention any more. A
program is plain PyTorch, put together from closures, so that Dynamo traces what a user would have
written.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

Scores = Callable[[Tensor], Tensor]


class Program:
    """A function of tensors, its arguments, and what it was made of."""

    def __init__(self, function: Callable, arguments: tuple[Tensor, ...], parts, mutant: str):
        self.function, self.arguments = function, arguments
        self.parts: dict[str, str] = parts
        self.mutant = mutant

    def __repr__(self) -> str:
        return f"Program({self.parts}, mutant={self.mutant!r})"


BATCH, HEADS, DIM = 2, 4, 8


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def positions(n: int, m: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n)[:, None], torch.arange(m)[None, :]


# name -> (n, m) -> boolean [.., n, m], True where a key is seen
MASKS: dict[str, Callable[[int, int], Tensor]] = {
    "causal": lambda n, m: positions(n, m)[1] <= positions(n, m)[0],
    "tril": lambda n, m: torch.ones(n, m, dtype=torch.bool).tril(),
    "tril float": lambda n, m: torch.tril(torch.ones(n, m)) != 0,
    "bottom right": lambda n, m: torch.ones(n, m, dtype=torch.bool).tril(m - n),
    "window": lambda n, m: (positions(n, m)[0] - positions(n, m)[1]).abs() < 4,
    "band": lambda n, m: (
        (positions(n, m)[1] <= positions(n, m)[0]) & (positions(n, m)[0] - positions(n, m)[1] < 5)
    ),
    "prefix": lambda n, m: (positions(n, m)[1] <= positions(n, m)[0]) | (positions(n, m)[1] < 3),
    "chunks": lambda n, m: positions(n, m)[0] // 4 == positions(n, m)[1] // 4,
    "dilated": lambda n, m: (positions(n, m)[0] - positions(n, m)[1]) % 3 == 0,
    "strict": lambda n, m: positions(n, m)[1] < positions(n, m)[0],
    "block": lambda n, m: torch.block_diag(torch.ones(3, 5), torch.ones(n - 3, m - 5)).bool(),
}

FILLS = {"-inf": -math.inf, "finfo.min": torch.finfo(torch.float32).min, "-1e9": -1e9, "-1e4": -1e4}


def _fill(scores: Tensor, seen: Tensor, how: str, value: float) -> Tensor:
    if how == "masked_fill":
        return scores.masked_fill(~seen, value)
    if how == "masked_fill_":
        return (scores * 1).masked_fill_(seen.logical_not(), value)
    if how == "where":
        return torch.where(seen, scores, value)
    if how == "where tensor":
        return torch.where(seen, scores, torch.full((), value))
    if how == "added":
        return scores + torch.zeros(seen.shape).masked_fill(~seen, value)
    if how == "added where":
        return scores + torch.where(seen, 0.0, value)
    return scores + (1.0 - seen.to(scores.dtype)) * value


HOWS = ("masked_fill", "masked_fill_", "where", "where tensor", "added", "added where", "product")

MODIFIERS: dict[str, Scores] = {
    "softcap": lambda s: 5 * torch.tanh(s / 5),
    "clamp": lambda s: s.clamp(-3, 3),
    "abs": lambda s: s.abs(),
    "cube": lambda s: s + 0.1 * s**3,
    "sigmoid": lambda s: 4 * torch.sigmoid(s),
    "ALiBi": lambda s: (
        s
        + torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]
        * (torch.arange(s.shape[-1])[None, :] - torch.arange(s.shape[-2])[:, None])
    ),
    "distance": lambda s: (
        s - 0.1 * (torch.arange(s.shape[-1]) - torch.arange(s.shape[-2])[:, None]).abs()
    ),
    "key bias": lambda s: s + torch.arange(s.shape[-1]) * 0.03,
    "half": lambda s: s / 2 + 1,
    "leaky": lambda s: torch.where(s > 0, s, 0.1 * s),
    "relu": lambda s: torch.relu(s) - s * 0.5,
}


def _softmax(how: str) -> Scores:
    def by_hand(s: Tensor) -> Tensor:
        e = (s - s.amax(-1, keepdim=True)).exp()
        return e / e.sum(-1, keepdim=True)

    return {
        "function": lambda s: F.softmax(s, dim=-1),
        "method": lambda s: s.softmax(-1),
        "dtype": lambda s: F.softmax(s, dim=-1, dtype=torch.float32).to(s.dtype),
        "log": lambda s: F.log_softmax(s, -1).exp(),
        "by hand": by_hand,
        "last dim": lambda s: torch.softmax(s, s.dim() - 1),
    }[how]


SOFTMAXES = ("function", "method", "dtype", "log", "by hand", "last dim")
SCALES = ("after", "on q", "on k", "both", "divided", "none")
LAYOUTS = ("bhsd", "bshd einsum", "3-D bmm", "fused qkv", "gqa repeat", "gqa einsum", "mqa")
MUTANTS = ("", "", "", "weights", "transposed", "axis", "after", "cumsum", "heads", "sorted")


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """One program with its arguments."""
    layout = draw(st.sampled_from(LAYOUTS))
    n = draw(st.sampled_from((6, 9, 16)))
    m = n if layout == "fused qkv" else draw(st.sampled_from((n, n, 7, 12)))
    masks = draw(st.lists(st.sampled_from(sorted(MASKS)), max_size=2))
    how, fill = draw(st.sampled_from(HOWS)), draw(st.sampled_from(sorted(FILLS)))
    if how == "product" and fill == "-inf":
        fill = "finfo.min"  # 0 * -inf is NaN in eager, everywhere
    combine = draw(st.sampled_from(("and", "or", "twice")))
    modifiers = draw(st.lists(st.sampled_from(sorted(MODIFIERS)), max_size=2))
    captured = draw(st.sampled_from(("", "", "bias", "padding", "documents", "temperature")))
    scale, softmax = draw(st.sampled_from(SCALES)), draw(st.sampled_from(SOFTMAXES))
    mutant = draw(st.sampled_from(MUTANTS))
    seed = draw(st.integers(0, 3))
    arguments, project = _layout(layout, n, m, seed)
    extra, capture = _captured(captured, n, m, seed)
    masked = _masking(masks, combine, how, FILLS[fill], n, m)
    normalise = _softmax(softmax)

    def function(*tensors: Tensor):
        q, k, v, finish = project(*tensors[: len(arguments)])
        q, k = _scaled(q, k, scale)
        s = q @ k.transpose(-2, -1)
        s = s / math.sqrt(DIM) if scale == "divided" else s * (DIM**-0.5 if scale == "after" else 1)
        for name in modifiers:
            s = MODIFIERS[name](s)
        s = capture(s, *tensors[len(arguments) :])
        s = masked(s)
        if mutant == "cumsum":
            s = s.clamp(min=-50).cumsum(-1)
        if mutant == "sorted":
            s = s.sort(-1).values
        if mutant == "heads":
            s = s + s.clamp(min=-50).mean(1, keepdim=True)
        p = torch.softmax(s, -2) if mutant == "axis" else normalise(s)
        if mutant == "transposed":
            p = p.transpose(-2, -1)
            return p @ (v.mean(-2, keepdim=True) * torch.arange(n)[:, None])
        if mutant == "after":
            p = p * (torch.arange(p.shape[-1]) % 2)
        out = finish(p @ v)
        return (out, p) if mutant == "weights" else out

    parts = {
        "layout": layout,
        "lengths": f"{n} {m}",
        "masks": f"{combine} of {masks} by {how} of {fill}" if masks else "",
        "modifiers": " ".join(modifiers),
        "captured": captured,
        "scale": scale,
        "softmax": softmax,
    }
    if layout == "3-D bmm" and mutant == "heads":
        mutant = "weights-free"  # there is no head axis to mix
    return Program(function, (*arguments, *extra), parts, mutant)


def _layout(layout: str, n: int, m: int, seed: int):
    b, h, d = BATCH, HEADS, DIM

    def plain(q, k, v):
        return q, k, v, lambda out: out.transpose(1, 2).reshape(b, n, h * d)

    def leaf(i, *shape):
        return _normal(10 * seed + i, *shape).requires_grad_()

    if layout == "bhsd":
        return (leaf(0, b, h, n, d), leaf(1, b, h, m, d), leaf(2, b, h, m, d)), plain
    if layout == "bshd einsum":

        def einsum(q, k, v):
            q, k, v = (torch.einsum("bshd->bhsd", x) for x in (q, k, v))
            return q, k, v, lambda out: torch.einsum("bhsd->bshd", out)

        return (leaf(0, b, n, h, d), leaf(1, b, m, h, d), leaf(2, b, m, h, d)), einsum
    if layout == "3-D bmm":

        def flat(q, k, v):
            q, k, v = (x.reshape(b * h, -1, d) for x in (q, k, v))
            # Scores are [b, h, n, m] again while they are modified.
            return q.view(b, h, n, d), k.view(b, h, m, d), v.view(b, h, m, d), lambda out: out

        return (leaf(0, b, h, n, d), leaf(1, b, h, m, d), leaf(2, b, h, m, d)), flat
    if layout == "fused qkv":

        def fused(x):
            q, k, v = x.view(b, n, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v, lambda out: out.transpose(1, 2).contiguous().view(b, n, h * d)

        return (leaf(0, b, n, 3 * h * d),), fused
    groups = 1 if layout == "mqa" else 2
    tensors = (leaf(0, b, h, n, d), leaf(1, b, groups, m, d), leaf(2, b, groups, m, d))
    if layout == "mqa":
        return tensors, plain

    def grouped(q, k, v):
        if layout == "gqa repeat":
            k, v = (x.repeat_interleave(h // groups, 1) for x in (k, v))
        else:
            k, v = (
                x[:, :, None].expand(b, groups, h // groups, m, d).reshape(b, h, m, d)
                for x in (k, v)
            )
        return plain(q, k, v)

    return tensors, grouped


def _captured(name: str, n: int, m: int, seed: int):
    if name == "bias":
        bias = _normal(seed + 50, 1, HEADS, n, m).requires_grad_()
        return (bias,), lambda s, x: s + x
    if name == "temperature":
        return (_normal(seed + 51, HEADS, 1, 1).requires_grad_(),), lambda s, x: s * x.exp()
    if name == "padding":
        keep = torch.ones(BATCH, m, dtype=torch.long)
        keep[0, m // 2 :] = 0
        return (keep,), lambda s, x: s.masked_fill(x[:, None, None, :] == 0, -math.inf)
    if name == "documents" and n == m:
        ids = (torch.arange(n) // 5).expand(BATCH, n).contiguous()
        return (ids,), lambda s, x: torch.where(
            x[:, None, :, None] == x[:, None, None, :], s, torch.finfo(s.dtype).min
        )
    return (), lambda s: s


def _masking(masks: list[str], combine: str, how: str, value: float, n: int, m: int) -> Scores:
    def apply(s: Tensor) -> Tensor:
        if not masks:
            return s
        first = MASKS[masks[0]](n, m)
        if len(masks) == 1:
            return _fill(s, first, how, value)
        second = MASKS[masks[1]](n, m)
        if combine == "twice":
            return _fill(_fill(s, first, how, value), second, how, value)
        return _fill(s, first & second if combine == "and" else first | second, how, value)

    return apply


def _scaled(q: Tensor, k: Tensor, scale: str) -> tuple[Tensor, Tensor]:
    if scale == "on q":
        return q * DIM**-0.5, k
    if scale == "on k":
        return q, k / math.sqrt(DIM)
    if scale == "both":
        return q * DIM**-0.25, k * DIM**-0.25
    return q, k
