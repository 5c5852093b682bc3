"""Score, mask and fill from one element's expression, without a graph."""

from __future__ import annotations

import pytest

from fa3_compile.spec import unnormalised
from fa3_compile.spec.mask_biases import exact_at_one
from fa3_compile.spec.separate import separate
from fa3_compile.spec.text import parse, text

LOWEST = "3.4028234663852886e+38"
CASES = {
    # element -> score, mask, dead, fill
    "s": ("s", "True", "nan", ""),
    "where(kv <= q, s, -inf)": ("s", "kv <= q", "nan", ""),
    "s + where(kv <= q, 0, -inf)": ("s", "kv <= q", "nan", ""),
    f"where(kv <= q, s, -{LOWEST})": ("s", "kv <= q", "score", f"-{LOWEST}"),
    f"s + where(kv <= q, 0, -{LOWEST})": ("s", "kv <= q", "score", f"s - {LOWEST}"),
    # In reach of a large score, unless the score is bounded.
    "where(kv <= q, s, -10000)": ("where(kv <= q, s, -10000)", "True", "nan", ""),
    "where(kv <= q, 20*tanh(s), -10000)": ("20*tanh(s)", "kv <= q", "score", "-10000"),
    # A factor keeps the fill out of reach, a negative one turns it round.
    "0.5*(s + where(kv <= q, 0, -inf))": ("0.5*s", "kv <= q", "nan", ""),
    "-(s + where(kv <= q, 0, -1e30))": (
        "where(kv <= q, 0, 1e+30) - s",
        "True",
        "nan",
        "",
    ),
    # Terms that undo one another are no mask.
    "s + load(0, kv) - 1e38": (
        "load(0, kv) + s - 1e+38",
        "False",
        "score",
        "load(0, kv) + s - 1e+38",
    ),
    "s + 1e38*load(0, kv) - 1e38": (
        "s + where(load(0, kv) == 1, 0, 1e+38*load(0, kv) - 1e+38)",
        "load(0, kv) > 0",
        "score",
        "s + where(load(0, kv) == 1, 0, 1e+38*load(0, kv) - 1e+38)",
    ),
    "s - 1e38*load(0, kv)": (
        "s - 1e+38*load(0, kv)",
        "load(0, kv) < 1",
        "score",
        "s - 1e+38*load(0, kv)",
    ),
    # A mask of 0 and 1 inside a select, which its constant would absorb.
    "s + where(kv <= q, 10000*load(0, kv), 0) - 10000": (
        "s + where(kv <= q, where(load(0, kv) == 1, 0, 10000*load(0, kv) - 10000), -10000)",
        "True",
        "nan",
        "",
    ),
    "s + 10000*load(0, kv)*load(0, q) - 10000": (
        "s + where(load(0, kv)*load(0, q) == 1, 0, 10000*load(0, kv)*load(0, q) - 10000)",
        "True",
        "nan",
        "",
    ),
    # The smaller of two masks, the larger, and what a floor at the fill leaves.
    "s + min(where(kv <= q, 0, -inf), where(load(0, kv) != 0, 0, -inf))": (
        "s",
        "(kv <= q) & (load(0, kv) != 0)",
        "nan",
        "",
    ),
    "s + max(where(kv <= q, 0, -inf), where(load(0, kv) != 0, 0, -inf))": (
        "max(where(kv <= q, 0, -inf), where(load(0, kv) != 0, 0, -inf)) + s",
        "(kv <= q) | (load(0, kv) != 0)",
        "nan",
        "",
    ),
    f"max(-{LOWEST}, s + where(kv <= q, 0, -{LOWEST}))": (
        "s",
        "kv <= q",
        "score",
        f"max(-{LOWEST}, s + where(kv <= q, 0, -{LOWEST}))",
    ),
    f"max(-5, s + where(kv <= q, 0, -{LOWEST}))": (
        f"max(-5, s + where(kv <= q, 0, -{LOWEST}))",
        "True",
        "nan",
        "",
    ),
    # A fill that the score decides is no mask, and a finite one beside it is none either.
    "where(kv <= q, where(s > 0, s, -inf), -inf)": ("where(s > 0, s, -inf)", "kv <= q", "nan", ""),
    f"where(kv <= q, where(s > 0, s, -inf), -{LOWEST})": (
        f"where(kv <= q, where(s > 0, s, -inf), -{LOWEST})",
        "True",
        "nan",
        "",
    ),
    # Comparisons are brought to one form, and to few.
    "where(1 - load(0, kv) == 0, s, -inf)": ("s", "load(0, kv) == 1", "nan", ""),
    "where((kv <= q) & (n0 < 9) | (kv <= q) & (n0 >= 9), s, -inf)": ("s", "kv <= q", "nan", ""),
    # A select that the mask decides is gone from the score.
    "where(kv <= q, s + where(kv <= q, 0, 1), -inf)": ("s", "kv <= q", "nan", ""),
    "where(where(kv <= q, load(0, kv), 0) != 0, s, -inf)": (
        "s",
        "(kv <= q) & (load(0, kv) != 0)",
        "nan",
        "",
    ),
}


@pytest.mark.parametrize("element", CASES)
def test_separate(element):
    found = separate(parse(element))
    fill = "" if found.fill is None else text(found.fill)
    assert (text(found.score), text(found.mask), found.dead, fill) == CASES[element]


def test_half_precision_reaches_less_far():
    element = parse("where(kv <= q, s, -65504.0)")
    assert separate(element).mask == True  # noqa: E712
    found = separate(element, half_fill=True)
    assert text(found.mask) == "kv <= q"
    assert found.fill is not None and text(found.fill) == f"-{LOWEST}"


def test_a_mask_of_zeros_and_ones_is_exactly_nothing_at_one():
    assert text(exact_at_one(parse("s + 10000*load(0, kv) - 10000"))) == (
        "s + where(load(0, kv) == 1, 0, 10000*load(0, kv) - 10000)"
    )
    # Small numbers add up exactly enough.
    assert text(exact_at_one(parse("s + 2*load(0, kv) - 2"))) == "2*load(0, kv) + s - 2"


# Of a root it is not known that it is real. A masked x is -inf for all that.
X = "(abs(s*pow(load(0), -0.5)) + load(1) + where(kv <= q, 0, -inf))"
SILU = f"pow(Skv, -1)*{X}*sigmoid({X})"


@pytest.mark.parametrize(
    "weight",
    [
        f"max(0, {SILU} - 0.05)",
        f"max(0, 2 - min(3, {SILU}))",
        # -inf times a number of unknown sign, or 0.
        f"max(0, abs(load(0))*{SILU} - 0.05)",
        f"max(0, {X}*abs(load(0))*sigmoid({X}*abs(load(0))) - 0.05)",
    ],
)
def test_a_maximum_of_nan_is_nan(weight):
    with pytest.raises(unnormalised.InfiniteWeight):
        unnormalised.separate(parse(weight))


@pytest.mark.parametrize(
    "weight",
    [
        f"max(0, {X})",
        f"sigmoid({X})",
        f"max(0, sigmoid({X}) - 0.05)",
        f"max(0, exp({X}))*where(kv < 5, 1, 0)",
    ],
)
def test_a_maximum_of_infinity_is_a_mask(weight):
    mask = unnormalised.separate(parse(weight))[1]
    assert text(mask).endswith("kv <= q") or text(mask) == "(kv <= 4) & (kv <= q)"
