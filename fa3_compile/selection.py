"""From a region to the kernel that will run it, and what the report says of both."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fa3_compile.errors import NOTHING, Decline
from fa3_compile.frontend.dynamo.graph import example_value
from fa3_compile.frontend.region import Region
from fa3_compile.lower.choose import TYPICAL_LENGTH, Choice, Problem, choose
from fa3_compile.lower.dispatch import built_backward, read_as
from fa3_compile.options import Options
from fa3_compile.report import Tiles
from fa3_compile.resources import source_hash
from fa3_compile.runtime.op import join_text
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.expr import Expr
from fa3_compile.spec.forms import name_of
from fa3_compile.spec.text import text
from fa3_compile.spec.tiles import Values, tile_counts, tile_map

TILE = 128
# Most tiles on a side of the report's picture of a mask, and fewest, where there are keys enough.
MOST_DRAWN, FEWEST_DRAWN = 64, 8


def problem_of(region: Region, options: Options | None = None) -> Problem:
    """The region as a kernel family is asked about it."""
    options = options or Options()
    layout = region.layout
    values = [example_value(x.source) for x in region.operands]
    needs_grad = any(x.needs_grad for x in (*region.loads, *region.factor_loads))
    if torch.is_grad_enabled():
        needs_grad = needs_grad or any(x.requires_grad for x in values)
    kv_heads = _hint(layout.total(layout.kv_heads), region)
    group = _hint(layout.total(layout.group), region)
    device = values[0].device
    return Problem(
        spec=region.spec,
        dtype=region.value.dtype,
        device=device,
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        batch=_hint(layout.total(layout.batch), region),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        q_len=_hint(layout.total(layout.query), region),
        kv_len=_hint(region.key_length, region),
        dim=_hint(region.width, region),
        v_dim=_hint(layout.total(layout.head_dim), region) + region.columns_of_ones,
        aux_dtypes=tuple(read_as(x.dtype) for x in region.loads),
        needs_grad=needs_grad,
        aux_needs_grad=tuple(x.needs_grad for x in region.loads),
        wants_lse=needs_grad or bool(region.statistics),
        autotune=options.autotune,
        deterministic=options.deterministic or torch.are_deterministic_algorithms_enabled(),
    )


def kernel_for(region: Region, options: Options) -> Choice:
    """The chosen kernel family. `Decline` if none takes the region."""
    problem = problem_of(region, options)
    if 0 in (problem.batch, problem.heads, problem.q_len, problem.kv_len, problem.dim):
        raise Decline("empty", region.output, NOTHING, message="there is nothing to compute")
    choice = choose(problem, options.kernels)
    if choice.kernel is None:
        shown = {n: r for n, r in choice.reasons.items() if n != "reference"} or choice.reasons
        reasons = "; ".join(f"{name}: {reason}" for name, reason in shown.items())
        hint = (
            "Change what a sentence names: the device, the dtype, a size, the form of the scores."
        )
        if options.kernels is not None:
            hint += " Or allow other families: options={'kernels': ...}."
        raise Decline("no-kernel", region.output, hint, message=reasons)
    return choice


def check_joined(region: Region) -> None:
    """`Decline` where several products are read as one, and the queries or keys that lie side by
    side for it are larger than the scores, which a bias of all queries and keys is: with few
    queries, as in decoding, that is the smaller one."""
    if len(region.pairs) > 1:
        problem = problem_of(region)
        rows = max(problem.heads * problem.q_len, problem.kv_heads * problem.kv_len)
        _check_copied(region, rows * problem.dim, problem)


def check_beside(region: Region) -> None:
    """`Decline` where keys or values of several tensors are put side by side, and are larger than
    the scores; so where V is copied, to have columns of ones."""
    problem = problem_of(region)
    if region.pairs[0].key.behind or region.value.behind:
        _check_copied(region, problem.kv_heads * problem.kv_len * problem.dim, problem)
    if region.columns_of_ones and problem.kv_heads * problem.v_dim > problem.heads * problem.q_len:
        raise Decline(
            "values-copied",
            region.output,
            NOTHING,
            message="queries are so few that a copy of V, for the sums of rows that weights are "
            "divided by, is larger than the scores",
        )


def _check_copied(region: Region, copied: int, problem: Problem) -> None:
    if copied > problem.heads * problem.q_len * problem.kv_len:
        raise Decline(
            "products-apart",
            region.output,
            NOTHING,
            message="queries or keys are so few that their scores are smaller than they are",
        )


def spec_text(region: Region, options: Options) -> str:
    """The op's `spec` argument: with all that its lowering depends on, for the caches' keys."""
    return join_text(region.spec, source_hash(), options.for_kernels())


def formulas(region: Region) -> dict:
    """What the report says of the attention itself."""
    spec = region.spec
    return {
        "form": name_of(spec),
        "score": text(spec.score),
        "mask": text(spec.mask) if spec.has_mask else "",
        "weight": text(spec.weight) if spec.weight is not None else "",
        "tiles": _tiles(region),
        "spec": str(spec),
    }


def described(region: Region, choice: Choice, options: Options) -> dict:
    """What the report says of the kernel, and of the one that computes the gradients."""
    assert choice.kernel is not None
    others = {n: r for n, r in choice.reasons.items() if n != choice.kernel.name}
    problem, gradients = problem_of(region, options), ""
    if problem.needs_grad:
        gradients = built_backward(problem, options.kernels).name
    return {"kernel": choice.kernel.name, "gradients": gradients, "other_kernels": others}


def begin(region: Region, choice: Choice, options: Options) -> None:
    """Begins to build the kernels, forward and backward, that the compiled program will ask for."""
    assert choice.kernel is not None
    problem = problem_of(region, options)
    choice.kernel.begin(problem)
    if problem.needs_grad:
        built_backward(problem, options.kernels).begin_backward(problem)


def _tiles(region: Region) -> Tiles | None:
    if not region.spec.has_mask:
        return None
    lengths = [region.layout.total(region.layout.query), region.key_length]
    if not all(n.is_Integer for n in lengths) or region.sizes:
        return Tiles(reason="known when the lengths are")
    q_len, kv_len = map(int, lengths)
    return tiles_of_masks(region.spec, q_len, kv_len, [(None, None)])


def tiles_of_masks(
    spec: AttentionSpec,
    q_len: int,
    kv_len: int,
    heads: Sequence[tuple[tuple[int, int] | None, Values | None]],
) -> Tiles:
    """Tiles of some (batch, head), with what the mask's captured tensors hold there, together;
    the picture is of the first. (None, None) stands for what holds of all, whatever they hold."""
    found = [
        tile_counts(spec, q_len, kv_len, TILE, TILE, head=head, values=values)
        for head, values in heads
    ]
    counts = [x for x in found if x is not None]
    if len(counts) < len(found):
        return Tiles(reason="known when it runs")
    block = _drawn_block(max(q_len, kv_len))
    head, values = heads[0]
    drawn = tile_map(spec, q_len, kv_len, block, block, head=head, values=values)
    picture = () if drawn is None else tuple("".join(Tiles.KINDS[x] for x in row) for row in drawn)
    empty, partial, full = (
        sum(getattr(x, kind) for x in counts) for kind in ("empty", "partial", "full")
    )
    reason = "" if values is None else f"{len(heads)} masks of the first call's data"
    return Tiles(empty, partial, full, reason.replace("1 masks", "the mask"), block, picture)


def _drawn_block(length: int) -> int:
    """Keys and queries a tile of the picture: a kernel's tile where that many can be seen."""
    if length > TILE * MOST_DRAWN:
        return TILE * -(-length // (TILE * MOST_DRAWN))
    block = TILE
    while block > 1 and length < FEWEST_DRAWN * block:
        block //= 2
    return block


def _hint(size: Expr, region: Region) -> int:
    """A size as a number; what it was while tracing where it is dynamic."""
    if size.is_Integer:
        return int(size)
    for node in region.output.graph.nodes:
        value = example_value(node)
        for dim in value.shape if isinstance(value, torch.Tensor) else ():
            if isinstance(dim, torch.SymInt):
                known = {str(k): int(v) for k, v in dim.node.shape_env.backed_var_to_val.items()}
                values = [(x, known[str(x)]) for x in size.free_symbols if str(x) in known]
                number = size.subs(values)
                return int(number) if number.is_Integer else TYPICAL_LENGTH
    return TYPICAL_LENGTH
