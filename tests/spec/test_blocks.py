"""Block bounds and tile counts never claim more than brute force finds."""

import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.blocks import kv_bounds, kv_full_bounds, q_bounds, q_full_bounds
from fa3_compile.spec.text import parse
from fa3_compile.spec.tiles import TileCounts, tile_counts
from tests.spec.by_hand import evaluate, masks

Q_LO, Q_HI = sympy.symbols("q_lo q_hi", integer=True, nonnegative=True)
KNOWN = [  # mask, outer bounds, full bounds
    ("kv <= q", "(0, Min(Skv, q_hi + 1))", "(0, Min(Skv, q_lo + 1))"),
    (
        "(kv <= q) & (q - kv < 128)",
        "(Max(0, q_lo - 127), Min(Skv, q_hi + 1))",
        "(Max(0, q_hi - 127), Min(Skv, q_lo + 1))",
    ),
    ("abs(q - kv) < 4", "(Max(0, q_lo - 3), Min(Skv, q_hi + 4))", None),
    (
        "(kv <= q) | (kv < n0)",
        "(0, Min(Skv, Max(n0, q_hi + 1)))",
        "(0, Min(Skv, Max(n0, q_lo + 1)))",
    ),
    (
        "floordiv(kv, 4) == floordiv(q, 4)",
        "(4*floordiv(q_lo, 4), Min(Skv, 4*floordiv(q_hi, 4) + 4))",
        "(4*floordiv(q_hi, 4), Min(Skv, 4*floordiv(q_lo, 4) + 4))",
    ),
    ("kv <= q + Skv - Sq", "(0, Min(Skv, Skv - Sq + q_hi + 1))", None),
    ("kv - q <= 0.5", "(0, Min(Skv, q_hi + 1))", "(0, Min(Skv, q_lo + 1))"),
    ("(kv <= q) & (load(0, b, kv) != 0)", "(0, Min(Skv, q_hi + 1))", "(0, 0)"),
    ("kv < load(0, b)", "(0, Skv)", "(0, 0)"),
    ("mod(kv, 4) == 0", "(0, Skv)", "(0, 0)"),
    ("kv*q < 8", "(0, Skv)", "(0, 0)"),
    ("True", "(0, Skv)", "(0, Skv)"),
    ("False", "(0, 0)", "(0, 0)"),
]


@pytest.mark.parametrize("mask, outer, full", KNOWN, ids=[x[0] for x in KNOWN])
def test_known_bounds(mask, outer, full):
    assert str(kv_bounds(parse(mask), Q_LO, Q_HI)) == outer
    if full:
        assert str(kv_full_bounds(parse(mask), Q_LO, Q_HI)) == full


def dense(mask, q_len, kv_len, n0, q=None):
    q = np.arange(q_len) if q is None else q
    found = evaluate(mask, q=q[:, None], kv=np.arange(kv_len)[None], Sq=q_len, Skv=kv_len, n0=n0)
    return np.broadcast_to(found, (len(q), kv_len))


lengths = st.integers(1, 14)


@given(masks, lengths, lengths, lengths, st.integers(0, 13), st.integers(1, 6))
@settings(max_examples=150)
def test_bounds_are_sound(mask, q_len, kv_len, n0, first, block):
    first = min(first, q_len - 1)
    last = min(first + block, q_len) - 1
    passes = dense(mask, q_len, kv_len, n0, np.arange(first, last + 1))
    at = {"q_lo": first, "q_hi": last, "Sq": q_len, "Skv": kv_len, "n0": n0}
    lo, hi = (int(evaluate(x, **at)) for x in kv_bounds(mask, Q_LO, Q_HI))
    assert 0 <= lo and hi <= kv_len
    outside = np.ones(kv_len, bool)
    outside[lo : max(lo, hi)] = False
    assert not passes[:, outside].any()
    lo, hi = (int(evaluate(x, **at)) for x in kv_full_bounds(mask, Q_LO, Q_HI))
    assert 0 <= lo and hi <= kv_len
    assert passes[:, lo : max(lo, hi)].all()


@given(masks, lengths, lengths, lengths, st.integers(0, 13), st.integers(1, 6))
@settings(max_examples=150)
def test_query_bounds_are_sound(mask, q_len, kv_len, n0, first, block):
    first = min(first, kv_len - 1)
    last = min(first + block, kv_len) - 1
    passes = dense(mask, q_len, kv_len, n0)[:, first : last + 1]
    at = {"q_lo": first, "q_hi": last, "Sq": q_len, "Skv": kv_len, "n0": n0}
    lo, hi = (int(evaluate(x, **at)) for x in q_bounds(mask, Q_LO, Q_HI))
    assert 0 <= lo and hi <= q_len
    outside = np.ones(q_len, bool)
    outside[lo : max(lo, hi)] = False
    assert not passes[outside].any()
    lo, hi = (int(evaluate(x, **at)) for x in q_full_bounds(mask, Q_LO, Q_HI))
    assert 0 <= lo and hi <= q_len
    assert passes[lo : max(lo, hi)].all()


def test_query_bounds_of_a_window() -> None:
    mask = parse("(kv <= q) & (q - kv < 128)")
    assert str(q_bounds(mask, Q_LO, Q_HI)) == "(q_lo, Min(Sq, q_hi + 128))"
    assert str(q_full_bounds(mask, Q_LO, Q_HI)) == "(q_hi, Min(Sq, q_lo + 128))"


@given(masks, lengths, lengths, lengths, st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=100)
def test_tile_counts_are_sound(mask, q_len, kv_len, n0, block_q, block_kv):
    passes = dense(mask, q_len, kv_len, n0)
    tiles = [
        passes[i : i + block_q, j : j + block_kv]
        for i in range(0, q_len, block_q)
        for j in range(0, kv_len, block_kv)
    ]
    found = tile_counts(AttentionSpec(mask=mask), q_len, kv_len, block_q, block_kv, (n0,))
    assert found is not None
    assert found.empty + found.partial + found.full == len(tiles)
    assert found.empty <= sum(not x.any() for x in tiles)
    assert found.full <= sum(x.all() for x in tiles)


@pytest.mark.parametrize(
    "mask, expected",
    [
        ("kv <= q", TileCounts(empty=28, partial=8, full=28)),
        ("(kv <= q) & (q - kv < 128)", TileCounts(empty=49, partial=15, full=0)),
        ("(kv <= q) & (load(0, b, kv) != 0)", TileCounts(empty=28, partial=36, full=0)),
        ("load(0, b, kv) != 0", None),
        ("True", TileCounts(empty=0, partial=0, full=64)),
        ("mod(kv, 128) < 128", TileCounts(empty=0, partial=0, full=64)),
        ("exp(0.01*kv) < 1e9", TileCounts(empty=0, partial=0, full=64)),
        ("exp(1.0*kv) > 1e9", TileCounts(empty=0, partial=8, full=56)),
    ],
)
def test_tile_counts(mask, expected):
    assert tile_counts(AttentionSpec(mask=parse(mask), aux=("bool",)), 1024, 1024, 128, 128) == (
        expected
    )
