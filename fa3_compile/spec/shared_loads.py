"""Captured tensors of which several keys of a row read one element: numbers added to whole rows,
temperatures, tables by distance. Its gradient is a sum of those keys' dS, which over a row sums to
0: often a small difference of large numbers."""

from __future__ import annotations

import functools
from collections.abc import Collection

import sympy

from fa3_compile.spec import expr as E
from fa3_compile.spec.attention import AttentionSpec


def keys_share(spec: AttentionSpec, wanted: Collection[int]) -> bool:
    """Whether keys of a row share an element that has a gradient through their scores' softmax;
    `wanted` are the captured tensors with a gradient."""
    return bool(wanted) and _keys_share(spec, frozenset(wanted))


@functools.lru_cache(maxsize=1024)  # asked in each call of a backward
def _keys_share(spec: AttentionSpec, wanted: frozenset[int]) -> bool:
    if not spec.normalized:
        return False
    scores = (spec.score,) if spec.fill is None else (spec.score, spec.fill)
    return any(x.tensor in wanted and not is_one_a_key(x) for x in E.loads_in(*scores))


def is_one_a_key(x: E.load) -> bool:
    """Whether no two keys of a row read the same element: a coordinate is kv, up to what all keys
    have in common."""
    return any(_moves_with_keys(i - E.KV) or _moves_with_keys(i + E.KV) for i in x.index)


def _moves_with_keys(rest: E.Expr) -> bool:
    return E.KV not in sympy.expand(rest).free_symbols
