"""A grammar of attention programs: layouts x scales x modifiers x masks x softmaxes, or weights
without one, x uses.

`programs()` draws one. A program is plain PyTorch, put together from closures, so that Dynamo
traces what a user would have written. A mutant is a program to which something was done: it may
be attention no more, which must not be fused, or attention of which more is used than the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.graph import program_parts as parts
from tests.graph.program_parts import Scores, Sizes

Expected = Literal["fused", "left", "either"]


class Program:
    """A function of tensors, its arguments, how it is run, and what it was made of.

    expected   "either" where fusing is a matter of taste: only the numbers count
    """

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: tuple[Tensor, ...],
        made_of: dict[str, str],
        expected: Expected,
        run: dict[str, Any],
    ):
        self.function, self.arguments, self.made_of = function, arguments, made_of
        self.expected, self.run = expected, run

    def __repr__(self) -> str:
        return f"Program({self.made_of}, expected={self.expected!r}, run={self.run})"


# What is done to the scores, the weights, the product or the operands.
NO_ATTENTION = (
    "softmax over queries",
    "cumulative scores",
    "heads mixed",
    "sorted",
    "rolled scores",
    "top keys",
    "two softmaxes",
    "squared weights",
    "thresholded weights",
    "weights transposed",
    "weights rolled",
    "weights flipped",
    "mean of heads",
    "a key left out",
    "running weights",
)
# What is no attention after a softmax, and may be one without.
OF_ELEMENTS = ("squared weights", "thresholded weights", "two softmaxes", "weights transposed")
MORE_THAN_ATTENTION = (
    "renormalised weights",
    "weights returned",
    "scores returned",
    "weights multiplied",
    "weights masked",
    "weights detached",
    "scores detached",
    "V written after the softmax",
    "K written after the scores",
    "first score written",
    "second product",
    "dropout of nothing",
    "row mean off",
)


@st.composite
def programs(draw: st.DrawFn, device: str = "cpu") -> Program:
    """One program with its arguments; on a GPU of sizes that a kernel has several tiles of."""

    def one_of(*values):
        return draw(st.sampled_from(values))

    layout = one_of(*parts.LAYOUTS)
    on_gpu = device != "cpu"
    n = one_of(1, 9, 16, 130, 200, 300) if on_gpu else one_of(1, 6, 9, 16)
    others = (150, 260) if on_gpu else (7, 12)
    m = one_of(*others) if n == 1 else one_of(n, n, *others)
    n = m if layout == "fused qkv" else n
    sizes = Sizes(n, m, one_of(8, 32, 64, 80, 128) if on_gpu else 8, device)
    masks = draw(st.lists(st.sampled_from(sorted(parts.MASKS)), max_size=2))
    how, fill = one_of(*parts.HOWS), one_of(*parts.FILLS)
    if how in parts.NEEDS_FINITE and fill == "-inf":
        fill = "finfo.min"  # 0 * -inf is NaN in eager, everywhere
    combine = one_of("and", "or", "twice")
    modifiers = draw(st.lists(st.sampled_from(sorted(parts.MODIFIERS)), max_size=2, unique=True))
    captured = one_of(*parts.CAPTURED)
    scale = one_of(*parts.SCALES)
    softmax = one_of(*parts.SOFTMAXES, *parts.UNNORMALISED)
    sink = one_of("", "", "", "", *parts.SINKS)
    use = one_of("", "", "residual", "twice", "slice", "sum", "in place", "flat")
    # Not float64: the oracle is eager itself there, to the last rounding.
    dtype = one_of(*[None] * (1 if on_gpu else 3), torch.bfloat16, torch.float16)
    mutant = one_of(*[""] * 24, *NO_ATTENTION, *MORE_THAN_ATTENTION)
    seed = draw(st.integers(0, 3))
    if softmax == "unshifted" and dtype in (torch.bfloat16, torch.float16):
        softmax = "by hand"
    plain = softmax in parts.UNNORMALISED
    if plain or mutant == "softmax over queries":
        sink = ""
    if mutant == "mean of heads" and layout == "mqa":
        mutant = ""
    lowest_added = combine == "twice" and (how == "product" or how.startswith("added"))
    if dtype == torch.float16 and (captured == "additive padding" or lowest_added):
        # In float16 eager's -65504 absorbs a score, and twice that is -inf; ours is in float32.
        dtype = torch.bfloat16
    # Where NaN is added to a row, eager's gradients of it are NaN too; ours are 0.
    dead = _has_dead_rows(masks, combine, sizes) or captured in MAY_HIDE_ALL
    additive = how == "logarithm" or how.startswith("added") and fill == "-inf"
    run: dict[str, Any] = {
        "dtype": dtype,
        "dynamic": one_of(None, None, None, True) if layout not in STATIC else None,
        # Autograd refuses a K that is written after it was multiplied.
        "training": one_of(True, True, False)
        and mutant != "K written after the scores"
        and not (dead and additive),
        "kernels": one_of(("reference",), ("cpu", "reference")),
    }
    if dead and softmax == "unshifted":
        # 0 / 0 in eager, where all of a row vanishes: docs/numerics.md.
        softmax = "by hand"
    if dead and fill in ("-1e4", "-65504"):
        # A row that is all -1e4 has scores of three digits: any other order rounds otherwise.
        run["kernels"] = ("reference",)
        fill = "-1e9" if on_gpu else fill
    if on_gpu:
        run["kernels"] = None
    if sizes.dim > 8 and scale == "none":
        scale = "after"  # scores beyond what a softmax without a maximum takes

    arguments, project = parts.layout(layout, sizes, seed)
    extra, capture = parts.captured(captured, sizes, seed)
    sinks = (parts.normal(seed + 60, parts.HEADS, device=device).requires_grad_(),) if sink else ()
    own, more = len(arguments), len(arguments) + len(extra)
    masked = _masking(masks, combine, how, fill)
    normalise = (parts.SOFTMAXES | parts.UNNORMALISED)[softmax]

    def function(*tensors: Tensor):
        q, k, v, finish = project(*tensors[:own])
        q, k = parts.scaled(q, k, scale)
        if mutant == "K written after the scores":
            k = k * 1
        s = parts.rescaled(q @ k.transpose(-2, -1), scale, sizes.dim)
        if mutant == "K written after the scores":
            k.add_(1)
        for name in modifiers:
            s = parts.MODIFIERS[name](s)
        s = masked(capture(s, *tensors[own:more]))
        s = _other_scores(s, mutant)
        if sink:
            p = parts.SINKS[sink][1](normalise(parts.SINKS[sink][0](s, tensors[more])))
        else:
            p = s.softmax(-2) if mutant == "softmax over queries" else normalise(s)
        if mutant == "V written after the softmax":
            v = (v * 1).mul_(2)
        p = _other_weights(p.to(v.dtype), mutant)
        if mutant == "a key left out":
            p, v = p[..., 1:], v[..., 1:, :]
        if mutant == "weights transposed":
            p, v = p.transpose(-2, -1), q
        if mutant == "mean of heads":
            p = p.mean(-3, keepdim=True)
        out = _used(finish(p @ v), use)
        if mutant == "second product":
            return out, p @ (v + 1)
        returned = {"weights returned": p, "scores returned": s, "K written after the scores": k}
        return (out, returned[mutant]) if mutant in returned else out

    made_of = {
        "layout": layout,
        "lengths": f"{n} {m}",
        "head dim": str(sizes.dim),
        "masks": f"{combine} of {masks} by {how} of {fill}" if masks else "",
        "modifiers": " ".join(modifiers),
        "captured": captured,
        "scale": scale,
        "softmax": softmax,
        "sink": sink,
        "use": use,
        "mutant": mutant,
    }
    expected: Expected = "left" if mutant in NO_ATTENTION else "fused"
    # Batches that only the mask has: K and V are shared by rows of different masks.
    shared = layout == "no batch" and captured in BY_BATCH
    # No key is seen at all.
    nothing = n == 1 and "strict" in masks
    # Only the softmax of the scores themselves, added to at most, is blind to the maximum.
    other = modifiers[-1:] != ["CogView"] or masks or captured or sink
    maximum = "CogView" in modifiers and (other or plain)
    # 0 * -inf is NaN, and fusing would lose that.
    infinite = how == "both" and masks and captured in ("padding", "lengths")
    # Eager does not normalise a row of one finite fill, spelled so.
    filled = softmax == "logsumexp" and (masks or captured)
    odd = shared or nothing or maximum or infinite or filled
    if expected == "fused" and (mutant or odd) or mutant in OF_ELEMENTS and plain:
        expected = "either"
    return Program(function, (*arguments, *extra, *sinks), made_of, expected, run)


# "flat batch" names every size but the length; "strided" cuts V's length to K's.
STATIC = ("flat batch", "strided")
MAY_HIDE_ALL = ("padding", "additive padding", "random mask", "documents", "lengths")
BY_BATCH = (*MAY_HIDE_ALL, "bias")


def _has_dead_rows(masks: list[str], combine: str, sizes: Sizes) -> bool:
    if not masks:
        return False
    at = parts.positions(torch.empty(sizes.n, sizes.m))
    first, *rest = (parts.MASKS[mask](*at) for mask in masks)
    for other in rest:
        first = first | other if combine == "or" else first & other
    return not bool(first.any(-1).all())


def _masking(masks: list[str], combine: str, how: str, value: str) -> Scores:
    def apply(s: Tensor) -> Tensor:
        seen = [parts.MASKS[mask](*parts.positions(s)) for mask in masks]
        if len(seen) == 2 and combine != "twice":
            seen = [seen[0] & seen[1] if combine == "and" else seen[0] | seen[1]]
        for each in seen:
            s = parts.fill(s, each, how, value)
        return s

    return apply


def _other_scores(s: Tensor, mutant: str) -> Tensor:
    if mutant == "cumulative scores":
        return s.clamp(min=-50).cumsum(-1)
    if mutant == "sorted":
        return s.sort(-1).values
    if mutant == "heads mixed":
        return s + s.clamp(min=-50).mean(-3, keepdim=True)
    if mutant == "rolled scores":
        return s.roll(1, -1)
    if mutant == "top keys":
        return s.masked_fill(s < s.topk(3, -1).values[..., -1:], -1e4)
    if mutant == "scores detached":
        return s.detach()
    if mutant == "row mean off":
        return s - s.clamp(min=-50).mean(-1, keepdim=True)
    if mutant == "first score written":
        s = s * 1
        s[..., 0] = 0.5
    return s


def _other_weights(p: Tensor, mutant: str) -> Tensor:
    if mutant == "two softmaxes":
        return p.nan_to_num().softmax(-1)
    if mutant == "squared weights":
        return p * p
    if mutant == "renormalised weights":
        p = p * (parts.positions(p)[1] % 3 + 1).to(p.dtype)
        return p / p.sum(-1, keepdim=True)
    if mutant == "thresholded weights":
        return torch.relu(p - 0.05)
    if mutant == "weights rolled":
        return p.roll(1, -1)
    if mutant == "weights flipped":
        return p.flip(-1)
    if mutant == "running weights":
        return p.cumsum(-1)
    if mutant == "weights multiplied":
        return p * (parts.positions(p)[1] % 3).to(p.dtype)
    if mutant == "weights masked":
        return p.masked_fill(parts.positions(p)[1] % 2 == 1, 0.0)
    if mutant == "weights detached":
        return p.detach()
    if mutant == "dropout of nothing":
        return torch.nn.functional.dropout(p, 0.0, training=True)
    return p


def _used(out: Tensor, use: str):
    if use == "residual":
        return out + torch.ones_like(out)
    if use == "twice":
        return out, out * 2
    if use == "slice":
        return out[..., :3]
    if use == "sum":
        return out.sum(-1), out
    if use == "in place":
        return (out * 1).mul_(2)
    return out.flatten() if use == "flat" else out
