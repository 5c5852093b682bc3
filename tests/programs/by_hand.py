"""Random programs that write their attention out: layouts x products x scales x modifiers x masks x
softmaxes, or weights without one, x uses x contexts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.programs import given, layouts, parts, softmaxes
from tests.programs.after import after
from tests.programs.choices import Choices
from tests.programs.drawing import drawn
from tests.programs.masks import HEADS, MASKS, positions
from tests.programs.mutants import other_scores, other_weights
from tests.programs.parts import Scores
from tests.programs.program import Program
from tests.programs.recipe import K_WRITTEN, Recipe

Attention = Callable[..., Any]


def by_hand(choices: Choices, device: str) -> Program:
    """One program whose attention is written out."""
    made, expected = drawn(choices, device)
    run = {name: getattr(made, name) for name in ("dtype", "dynamic", "training", "kernels")}
    groups, written = _written(made)
    attention = _attention(made, [len(x) for x in groups], *written)
    function = _in_context(attention, made, device)
    again = _flat(_written(made.of_other_lengths())[0]) if made.other else None
    return Program(function, _flat(groups), made.made_of(), expected, run, again)


def _written(made: Recipe) -> tuple[tuple[tuple[Tensor, ...], ...], tuple[Callable[..., Any], ...]]:
    """Q, K and V, what scores capture, sinks, and gates; and what makes something of the first, the
    second and the last of them."""
    arguments, project = layouts.layout(made.layout, made.sizes, made.seed)
    extra, capture = _captured(made)
    sinks: tuple[Tensor, ...] = ()
    if made.sink:
        sinks = (parts.normal(made.seed + 60, HEADS, device=made.sizes.device).requires_grad_(),)
    gates, gated = after(made.after, made.after_masks, made.sizes, made.seed)
    return (_as_drawn(arguments, made), extra, sinks, gates), (project, capture, gated)


def _flat(groups: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(x for group in groups for x in group)


def _as_drawn(arguments: tuple[Tensor, ...], made: Recipe) -> tuple[Tensor, ...]:
    """Q, K and V, or what they are made of, with the recipe's numbers; leaves, or frozen."""
    plain = [x.detach() for x in arguments]
    changed = parts.NUMBERS[made.numbers](*plain) if len(plain) > 1 else plain
    frozen = {"Q": 1, "Q, K and V": len(plain)}.get(made.frozen, 0)
    return tuple(x.clone().requires_grad_(i >= frozen) for i, x in enumerate(changed))


def _captured(made: Recipe) -> tuple[tuple[Tensor, ...], Callable[..., Tensor]]:
    """(tensors, (scores, *tensors) -> scores)"""
    if made.given:
        return given.given(made.captured, made.sizes, made.seed)
    if made.expression is None:
        return parts.captured(made.captured, made.sizes, made.seed)

    def fill(s: Tensor, seen: Tensor) -> Tensor:
        return parts.fill(s, seen, made.how, made.fill)

    changed = made.expression
    return changed.given, lambda s, *given: changed(s, fill, *given)


def _attention(
    made: Recipe,
    counts: Sequence[int],
    project: Callable[..., Any],
    capture: Callable[..., Tensor],
    gated: Callable[..., Tensor],
) -> Attention:
    """A function of the layout's tensors, those that scores capture, sinks, and gates: `counts` of
    each."""
    masked = _masking(made) if made.softmax not in softmaxes.OF_MASKS else lambda s: s
    late = parts.LATE.get(made.late, lambda s: s)
    keys = parts.SLICES.get(made.keys)
    of_k, of_v = layouts.PRODUCTS[made.of_scores], layouts.PRODUCTS[made.of_values]

    def attention(*tensors: Tensor):
        own, extra, sinks, gates = _split(tensors, counts)
        q, k, v, finish = project(*own)
        q, k = parts.scaled(q, k, made.scale)
        if made.context == "graph break":
            torch._dynamo.graph_break()
        if made.mutant == K_WRITTEN:
            k = k * 1

        def scored(q: Tensor) -> Tensor:
            s = parts.rescaled(of_k(q, k.transpose(-2, -1)), made.scale, made.sizes.dim)
            for name in made.modifiers:
                s = parts.MODIFIERS[name](s)
            s = other_scores(late(masked(capture(s, *extra))), made.mutant)
            return s[..., keys(s.shape[-1])] if keys else s

        s = scored(q)
        if made.mutant == K_WRITTEN:
            k.add_(1)
        p, total = _weights(s, sinks, made)
        if made.use == "difference":
            p = p - 0.5 * _weights(scored(q * 0.7), sinks, made)[0]
        p = _beside(p, s, made)
        every_v = v
        if keys:
            v = v[..., keys(v.shape[-2]), :]
        if made.mutant == "V written after the softmax":
            v = (v * 1).mul_(2)
        p = gated(other_weights(p.to(v.dtype), made.mutant), _seen(s, made), *gates)
        if made.mutant == "a key left out":
            p, v = p[..., 1:], v[..., 1:, :]
        if made.mutant == "weights transposed":
            p, v = p.transpose(-2, -1), q
        if made.mutant == "mean of heads":
            p = p.mean(-3, keepdim=True)
        out = of_v(p, v)
        out = _used(finish(out if total is None else out / total.to(v.dtype)), made.use)
        if made.use == "LSE":
            return out, s.logsumexp(-1)
        if made.use == "function of LSE":
            return out, torch.tanh(s.logsumexp(-1) / 4).sum(-1)
        if made.use == "LSE by hand":
            top = s.amax(-1, keepdim=True)
            return out, (top + (s - top).exp().sum(-1, keepdim=True).log()).squeeze(-1)
        if made.use == "shared scores":
            return out, of_v((s * 0.5).softmax(-1).to(v.dtype), v * 2)
        if made.use == "beside a call" and q.shape[:-2] == k.shape[:-2]:
            return out, F.scaled_dot_product_attention(q, k, every_v)
        if made.mutant == "second product":
            return out, p @ (v + 1)
        returned = {"weights returned": p, "scores returned": s, K_WRITTEN: k}
        return (out, returned[made.mutant]) if made.mutant in returned else out

    return attention


def _split(tensors: Sequence[Tensor], counts: Sequence[int]) -> list[Sequence[Tensor]]:
    groups, at = [], 0
    for count in counts:
        groups.append(tensors[at : at + count])
        at += count
    return groups


def _weights(s: Tensor, sinks: Sequence[Tensor], made: Recipe) -> tuple[Tensor, Tensor | None]:
    """The weights, and their sums where those are divided by after the product with V."""
    if made.softmax == "divided late":
        p = (s - s.amax(-1, keepdim=True)).exp()
        return p, p.sum(-1, keepdim=True)
    if made.softmax in softmaxes.OF_MASKS:
        seen = _seen(s, made)
        assert seen is not None, "such a softmax is drawn with masks alone"
        return softmaxes.OF_MASKS[made.softmax](s, seen), None
    normalise = (softmaxes.SOFTMAXES | softmaxes.UNNORMALISED)[made.softmax]
    if made.sink:
        beside, dropped = softmaxes.SINKS[made.sink]
        return dropped(normalise(beside(s, sinks[0]))), None
    return (s.softmax(-2) if made.mutant == "softmax over queries" else normalise(s)), None


def _beside(p: Tensor, s: Tensor, made: Recipe) -> Tensor:
    if made.use == "function beside":
        return p + 0.1 * F.relu(s).square().to(p.dtype)
    if made.use == "identity beside":
        return p + torch.eye(*s.shape[-2:], dtype=p.dtype, device=p.device)
    return p - 0.5 / p.shape[-1] if made.use == "number beside" else p


def _in_context(attention: Attention, made: Recipe, device: str) -> Attention:
    def function(*tensors: Tensor):
        if made.context == "checkpoint":
            return checkpoint(attention, *tensors, use_reentrant=False)
        if made.context == "autocast":
            with torch.autocast(device, dtype=torch.bfloat16):
                return attention(*tensors)
        if made.use == "shared K and V":
            queries, *others = tensors
            return attention(*tensors), attention(queries * 0.5, *others)
        return attention(*tensors)

    return function


def _masking(made: Recipe) -> Scores:
    def apply(s: Tensor) -> Tensor:
        seen = [MASKS[mask](*positions(s)) for mask in made.masks]
        both = _seen(s, made)
        if both is not None and made.combine != "twice":
            seen = [both]
        for each in seen:
            s = parts.fill(s, each, made.how, made.fill)
        return s

    return apply


def _seen(s: Tensor, made: Recipe) -> Tensor | None:
    """What the masks show; None without any."""
    seen: Tensor | None = None
    for each in (MASKS[mask](*positions(s)) for mask in made.masks):
        seen = each if seen is None else seen | each if made.combine == "or" else seen & each
    return seen


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
