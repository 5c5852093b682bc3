"""A grammar of attention programs: layouts x products x scales x modifiers x masks x softmaxes, or
weights without one, x uses x contexts; and calls of PyTorch's own attentions.

`programs()` draws one. A program is plain PyTorch, put together from closures, so that Dynamo
traces what a user would have written. A mutant is a program to which something was done: it may
be attention no more, which must not be fused, or attention of which more is used than the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.graph import program_layouts as layouts
from tests.graph import program_parts as parts
from tests.graph.program import Expected, Program
from tests.graph.program_calls import call
from tests.graph.program_choices import Choices, Drawn, Source
from tests.graph.program_masks import HEADS, MASKS, positions
from tests.graph.program_mutants import (
    MORE_THAN_ATTENTION,
    NO_ATTENTION,
    OF_ELEMENTS,
    other_scores,
    other_weights,
)
from tests.graph.program_parts import Scores, Sizes

# What the programs of a family have in common: all that their kernel is made for.
KEPT = (
    "spelling", "n", "dim", "masks", "how", "fill", "combine", "modifiers", "captured", "scale",
    "softmax", "late", "sink", "after", "dtype", "training", "kernels",
    "attention", "attn_mask", "mask mods", "block", "score mod",
)  # fmt: skip


@st.composite
def programs(draw: st.DrawFn, device: str = "cpu") -> Program:
    """Programs with their arguments; on a GPU of sizes that a kernel has several tiles of."""
    return program(Choices(Drawn(draw)), device)


def family(source: Source, device: str, count: int) -> Iterator[Program]:
    """`count` programs of the same scores and softmax in different layouts, products, lengths, uses
    and contexts. What takes seconds is a kernel."""
    choices = Choices(source)
    yield program(choices, device)
    kept = {name: choices.made[name] for name in KEPT if name in choices.made}
    for _ in range(count - 1):
        yield program(Choices(source, kept), device)


def program(choices: Choices, device: str) -> Program:
    """The program of these choices."""
    written = choices.one_of("spelling", "by hand", "by hand", "by hand", "call") == "by hand"
    return by_hand(choices, device) if written else call(choices, device)


def by_hand(choices: Choices, device: str) -> Program:
    """One program whose attention is written out."""
    one_of = choices.one_of
    layout = one_of("layout", *layouts.LAYOUTS)
    sizes = parts.sizes(choices, device, square=layout == "fused qkv")
    n, m, on_gpu = sizes.n, sizes.m, device != "cpu"
    of_scores = one_of("scores", "operator", "operator", *layouts.PRODUCTS)
    of_values = one_of("values", "operator", "operator", *layouts.PRODUCTS)
    masks = choices.up_to_two("masks", sorted(MASKS))
    how, fill = one_of("how", *parts.HOWS), one_of("fill", *parts.FILLS)
    if how in parts.NEEDS_FINITE and fill == "-inf":
        fill = "finfo.min"  # 0 * -inf is NaN in eager, everywhere
    combine = one_of("combine", "and", "or", "twice")
    modifiers = choices.up_to_two("modifiers", sorted(parts.MODIFIERS), unique=True)
    captured = one_of("captured", *parts.CAPTURED)
    scale = one_of("scale", *parts.SCALES)
    softmax = one_of("softmax", *parts.SOFTMAXES, "divided late", *parts.UNNORMALISED)
    late = one_of("late", *[""] * 20, *parts.LATE)
    sink = one_of("sink", "", "", "", "", *parts.SINKS)
    after = one_of("after", *parts.AFTER)
    use = one_of("use", "", "", *USES)
    context = one_of("context", *[""] * 9, "checkpoint", "autocast", "graph break")
    # Not float64: the oracle is eager itself there, to the last rounding.
    dtype = one_of("dtype", *[None] * (1 if on_gpu else 3), torch.bfloat16, torch.float16)
    mutant = one_of("mutant", *[""] * 24, *NO_ATTENTION, *MORE_THAN_ATTENTION)
    seed = one_of("seed", *range(4))
    large = on_gpu and (captured == "temperature" or "cube" in modifiers)
    if softmax == "unshifted" and (dtype in (torch.bfloat16, torch.float16) or large):
        softmax = "by hand"  # exp overflows
    grows = "cube" in modifiers or captured == "temperature"
    if scale == "sharp" and (grows or softmax in (*parts.NEEDS_KEYS, *parts.UNNORMALISED)):
        scale = "after"  # powers and exponentials overflow
    if scale == "sharp" and after and dtype is not None:
        scale = "after"  # all weight on one key: docs/numerics.md
    if softmax == "divided late" and (mutant or sink):
        softmax = "by hand"
    plain = softmax in parts.UNNORMALISED
    if use == "LSE" and (plain or sink or mutant or softmax == "off by one"):
        use = ""
    if plain or mutant == "softmax over queries":
        sink = ""
    if use == "shared K and V" and after == "dropout":
        after = ""
    if mutant == "mean of heads" and layout == "mqa":
        mutant = ""
    if layout == "mqa" and of_scores in layouts.BATCHED:
        of_scores = "operator"
    broadcast = layout == "mqa" or layout == "no batch" and captured in BY_BATCH
    if of_values in layouts.BATCHED and (broadcast or mutant == "mean of heads"):
        of_values = "operator"
    if context == "autocast" and dtype is not None:
        context = ""
    if context == "checkpoint" and mutant == "K written after the scores":
        context = ""
    added = how == "product" or how.startswith("added")
    changed = combine == "twice" or late or softmax in parts.UNNORMALISED
    if dtype == torch.float16 and (captured in ADDITIVE or (masks and added and changed)):
        # In float16 eager's -65504 absorbs a score, and twice that is -inf; ours is in float32.
        dtype = torch.bfloat16
    # Where NaN is added to a row, eager's gradients of it are NaN too; ours are 0.
    dead = _has_dead_rows(masks, combine, sizes) or captured in MAY_HIDE_ALL
    additive = how == "logarithm" or how.startswith("added") and fill == "-inf"
    additive = additive or (softmax in parts.UNNORMALISED and mutant == "renormalised weights")
    if use == "LSE" and dead:
        use = ""  # of a row of fills eager's gradient is that of no logarithm
    run: dict[str, Any] = {
        "dtype": dtype,
        "dynamic": one_of("dynamic", None, None, None, True) if layout not in STATIC else None,
        # Autograd refuses a K that is written after it was multiplied.
        "training": one_of("training", True, True, False)
        and mutant != "K written after the scores"
        and not (dead and additive),
        "kernels": one_of("kernels", ("reference",), ("cpu", "reference")),
    }
    if (dead or captured == "infinite bias") and softmax in parts.NEEDS_KEYS:
        # 0 / 0 in eager, where all of a row vanishes: docs/numerics.md.
        softmax = "by hand"
    if dead and fill in ("-1e4", "-65504"):
        # A row that is all -1e4 has scores of three digits: any other order rounds otherwise.
        run["kernels"] = ("reference",)
        fill = "-1e9" if on_gpu else fill
    if on_gpu:
        run["kernels"] = None
    if (sizes.dim > 8 or captured == "temperature") and scale == "none":
        # Scores beyond what a softmax without a maximum takes, and of which float32 rounds much off.
        scale = "after"

    expected: Expected = "left" if mutant in NO_ATTENTION else "fused"
    # Batches that only the mask has: K and V are shared by rows of different masks.
    shared = layout == "no batch" and captured in BY_BATCH
    # No key is seen at all.
    nothing = n == 1 and "strict" in masks
    # Only the softmax of the scores themselves, added to at most, is blind to the maximum.
    other = modifiers[-1:] != ["CogView"] or masks or captured or sink
    maximum = "CogView" in modifiers and (other or plain or softmax == "off by one")
    # 0 * -inf is NaN, and fusing would lose that.
    infinite = how == "both" and masks and captured in ("padding", "empty sequence", "lengths")
    # Eager does not normalise a row of one finite fill, spelled so.
    filled = softmax == "logsumexp" and (masks or captured)
    autocast = context == "autocast"
    # A masked score is no small weight where it is multiplied by a decay, and silu(-inf) is NaN.
    decayed = softmax in ("retention", "silu") and (masks or captured in MAY_HIDE_ALL)
    # Sums are given for weights that nothing has changed.
    summed = softmax == "relu of its sum" and after
    # Which heads are whose is not known where their numbers are symbols.
    merged = use == "flat" if layout == "fused qkv" else (of_scores, of_values) != ("operator",) * 2
    symbols = run["dynamic"] and (layout == "fused qkv" or layout.startswith("gqa")) and merged
    odd = shared or nothing or maximum or infinite or filled or autocast or decayed or summed
    # A factor between the product and the division is not looked through.
    odd = odd or (softmax == "divided late" and of_values == "baddbmm")
    # A function of a masked score may make something else of its fill.
    # The lengths of K and V are halves of the tensors', and not known to be those of the scores.
    halved = run["dynamic"] and layout == "every other key"
    odd = odd or symbols or halved or late
    # Two attentions; and weights without a softmax whose NaN are replaced.
    odd = odd or use == "shared K and V" or (plain and after in ("nan_to_num", "isnan"))
    if expected == "fused" and (mutant or odd) or mutant in OF_ELEMENTS and plain:
        expected = "either"
    # One query of several heads that share a key is as good as several queries.
    # A checkpoint draws again where no AOTAutograd makes its random numbers functional.
    others = layout in OTHER_BATCHES or n == 1 or context == "checkpoint"
    if after == "dropout" and (expected != "fused" or others):
        after = ""  # it would draw other numbers

    arguments, project = layouts.layout(layout, sizes, seed)
    extra, capture = parts.captured(captured, sizes, seed)
    sinks = (parts.normal(seed + 60, HEADS, device=device).requires_grad_(),) if sink else ()
    gate, gated = parts.after(after, sizes, seed)
    own, more = len(arguments), len(arguments) + len(extra)
    gates = more + len(sinks)
    masked = _masking(masks, combine, how, fill)
    normalise = (parts.SOFTMAXES | parts.UNNORMALISED).get(softmax)
    of_k, of_v = layouts.PRODUCTS[of_scores], layouts.PRODUCTS[of_values]

    def attention(*tensors: Tensor):
        q, k, v, finish = project(*tensors[:own])
        q, k = parts.scaled(q, k, scale)
        if context == "graph break":
            torch._dynamo.graph_break()
        if mutant == "K written after the scores":
            k = k * 1
        s = parts.rescaled(of_k(q, k.transpose(-2, -1)), scale, sizes.dim)
        if mutant == "K written after the scores":
            k.add_(1)
        for name in modifiers:
            s = parts.MODIFIERS[name](s)
        s = parts.LATE.get(late, lambda s: s)(masked(capture(s, *tensors[own:more])))
        s = other_scores(s, mutant)
        total = None
        if normalise is None:
            p = (s - s.amax(-1, keepdim=True)).exp()
            total = p.sum(-1, keepdim=True).to(v.dtype)
        elif sink:
            p = parts.SINKS[sink][1](normalise(parts.SINKS[sink][0](s, tensors[more])))
        else:
            p = s.softmax(-2) if mutant == "softmax over queries" else normalise(s)
        if mutant == "V written after the softmax":
            v = (v * 1).mul_(2)
        p = other_weights(p.to(v.dtype), mutant)
        p = gated(p, *tensors[gates:])
        if mutant == "a key left out":
            p, v = p[..., 1:], v[..., 1:, :]
        if mutant == "weights transposed":
            p, v = p.transpose(-2, -1), q
        if mutant == "mean of heads":
            p = p.mean(-3, keepdim=True)
        out = of_v(p, v)
        out = _used(finish(out if total is None else out / total), use)
        if mutant == "second product":
            return out, p @ (v + 1)
        if use == "LSE":
            return out, s.logsumexp(-1)
        returned = {"weights returned": p, "scores returned": s, "K written after the scores": k}
        return (out, returned[mutant]) if mutant in returned else out

    def twice(*tensors: Tensor):
        queries, *others = tensors
        return attention(*tensors), attention(queries * 0.5, *others)

    def function(*tensors: Tensor):
        if context == "checkpoint":
            return checkpoint(attention, *tensors, use_reentrant=False)
        if context == "autocast":
            with torch.autocast(device, dtype=torch.bfloat16):
                return attention(*tensors)
        return twice(*tensors) if use == "shared K and V" else attention(*tensors)

    made_of = {
        "layout": layout,
        "products": f"{of_scores}, {of_values}",
        "lengths": f"{n} {m}",
        "head dim": str(sizes.dim),
        "masks": f"{combine} of {masks} by {how} of {fill}" if masks else "",
        "modifiers": " ".join(modifiers),
        "captured": captured,
        "late": late,
        "scale": scale,
        "softmax": softmax,
        "sink": sink,
        "after": after,
        "use": use,
        "context": context,
        "mutant": mutant,
    }
    return Program(function, (*arguments, *extra, *sinks, *gate), made_of, expected, run)


USES = ("residual", "twice", "slice", "sum", "in place", "flat", "LSE", "shared K and V")
# "flat batch" names every size but the length; "strided" cuts V's length to K's.
STATIC = ("flat batch", "strided")
ADDITIVE = ("additive padding", "added empty sequence", "two paddings")
MAY_HIDE_ALL = ("padding", "empty sequence", *ADDITIVE, "random mask", "documents", "lengths")
# Whose weights have other batches than the operator, or heads in another order.
OTHER_BATCHES = ("windows", "one batch of K", "no batch", "gqa tiled")
BY_BATCH = (*MAY_HIDE_ALL, "bias")


def _has_dead_rows(masks: list[str], combine: str, sizes: Sizes) -> bool:
    if not masks:
        return False
    at = positions(torch.empty(sizes.n, sizes.m))
    first, *rest = (MASKS[mask](*at) for mask in masks)
    for other in rest:
        first = first | other if combine == "or" else first & other
    return not bool(first.any(-1).all())


def _masking(masks: list[str], combine: str, how: str, value: str) -> Scores:
    def apply(s: Tensor) -> Tensor:
        seen = [MASKS[mask](*positions(s)) for mask in masks]
        if len(seen) == 2 and combine != "twice":
            seen = [seen[0] & seen[1] if combine == "and" else seen[0] | seen[1]]
        for each in seen:
            s = parts.fill(s, each, how, value)
        return s

    return apply


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
