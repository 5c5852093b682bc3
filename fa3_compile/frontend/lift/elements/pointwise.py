"""Element rules: what those of element-wise operators share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from fa3_compile.spec.expr import Expr, where

aten = torch.ops.aten
# Selects whose branches are followed together: each doubles them.
MOST_SELECTS = 4


def is_bool(node: fx.Node) -> bool:
    return node.meta["val"].dtype == torch.bool


def is_float(node: fx.Node) -> bool:
    return node.meta["val"].dtype.is_floating_point


def through_where(function, *args: Expr) -> Expr:
    """function(where(c, 1, 0)) -> where(c, function(1), function(0)), for constant branches.

    It keeps masks made by arithmetic, `(1 - mask) * -1e9`, readable as masks.
    """
    selects = {a for a in args if isinstance(a, where)}
    others = [a for a in args if not isinstance(a, where)]
    constant = len(selects) == 1 and all(x.is_number for x in next(iter(selects)).args[1:])
    if constant and all(x.is_number for x in others):
        select = next(iter(selects))
        condition = select.args[0]
        branches = [
            function(*(a.args[side] if isinstance(a, where) else a for a in args))
            for side in (1, 2)
        ]
        return where(condition, *branches)
    return function(*args)


def by_cases(function: Callable[[Expr], Expr], x: Expr, selects: int = MOST_SELECTS) -> Expr | None:
    """function(x) as selects between numbers, where x has no other values: a product of masks of 0
    and 1. None where it may be anything else."""
    if x.is_number:
        return function(x)
    found = [y for y in x.atoms(where) if all(branch.is_number for branch in y.args[1:])]
    if not found or not selects:
        return None
    select = min(found, key=str)
    condition, *branches = select.args
    cases = [by_cases(function, x.xreplace({select: y}), selects - 1) for y in branches]
    return None if None in cases else where(condition, *cases)
