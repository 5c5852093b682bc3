"""Named factors on the probabilities after the softmax."""

from __future__ import annotations

import math

import sympy

from fa3_compile.spec.expr import KV, B, Expr, H, Q, uniform, where

STEPS = 2**24  # of `uniform`


def dropout_weight(seed: Expr, p: float) -> Expr:
    """What `F.dropout(weights, p)` multiplies each weight by; `seed` is a loaded integer.

    p counts in whole steps of `uniform`, rounded up, so that float32 and float64 agree on every
    element: the share dropped is p to within 6e-8.
    """
    if p == 0:
        return sympy.S.One
    if p == 1:
        return sympy.S.Zero
    dropped = uniform(seed, B, H, Q, KV) < sympy.Float(math.ceil(p * STEPS) / STEPS)
    return where(dropped, sympy.S.Zero, sympy.Float(1 / (1 - p)))


def weight_names(weight: Expr | None) -> list[str]:
    """The names of a spec's weight: dropout by its p, anything else custom."""
    if weight is None:
        return []
    if isinstance(weight, where):
        dropped, zero, kept = weight.args
        if isinstance(dropped, sympy.StrictLessThan) and zero == 0 and kept.is_number:
            if isinstance(dropped.lhs, uniform) and dropped.rhs.is_number:
                return [f"dropout({float(dropped.rhs):.4g})"]
    return ["custom weight"]
