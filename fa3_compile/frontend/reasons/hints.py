"""What a fused region's user could change to have it faster."""

from __future__ import annotations

import sympy

from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.expr import KV, Expr, S, depends_on, load, where
from fa3_compile.spec.fills import OUT_OF_REACH

# A number that is added to scores to hide them.
HIDES = -1e3


def hints(spec: AttentionSpec) -> list[str]:
    """Sentences, each of something that keeps blocks of keys from being skipped."""
    found = []
    if fills := sorted({x for select in spec.score.atoms(where) for x in _fills(select)}):
        why = "which a score could be below"
        then = "fill with -inf or torch.finfo(dtype).min"
        if fills[0] <= OUT_OF_REACH:
            why = "beside a bias that is given and may be -inf"
            then = "fill with -inf, or make the bias a parameter"
        found.append(
            f"Scores are filled with {fills[0]:g}, {why}, so that no block of keys is skipped: "
            f"{then}."
        )
    loads = {x for r in spec.mask.atoms(sympy.Gt) if isinstance(r.lhs, load) for x in [r.lhs]}
    if any(spec.aux[x.tensor] == "int" for x in loads):
        found.append(
            "A mask of integers may hold others than 0 and 1, so that no block of keys is skipped "
            "for the masks beside it: make it boolean."
        )
    return found


def _fills(select: where) -> list[float]:
    condition, *branches = select.args
    numbers = [float(x) for x in branches if x.is_number and float(x) <= HIDES]
    by_place = depends_on(condition, [KV]) and S not in condition.free_symbols
    return numbers if by_place and any(_is_score(x) for x in branches) else []


def _is_score(branch: Expr) -> bool:
    return branch == 0 or not branch.is_number
