"""Where the parts of a score are computed, and how it is arranged for the online softmax."""

import math

import pytest

from fa3_compile.lower.printers import hoist
from fa3_compile.lower.printers.formulas import with_small_digits
from fa3_compile.spec.expr import S
from fa3_compile.spec.text import parse, text

LOG2E = math.log2(math.e)


def test_a_scale_folds_into_the_exponent():
    logits = hoist.arrange(parse("0.125*s"))
    assert (logits.x, logits.shift, logits.log2) == (S, 0, True)
    assert logits.scale == pytest.approx(0.125 * LOG2E)


def test_a_softcap_folds_its_outer_factor():
    logits = hoist.arrange(parse("20.0*tanh(0.05*s)"))
    assert text(logits.x) == "tanh(0.05*s)"
    assert logits.scale == pytest.approx(20 * LOG2E)


@pytest.mark.parametrize("score", ["-0.125*s", "-s*load(0, h)", "0.5*s + abs(q - kv)"])
def test_only_a_positive_number_folds(score):
    logits = hoist.arrange(parse(score))
    assert logits.scale == 1.0 and logits.log2


def test_a_distance_is_split_into_lane_row_and_block():
    """The magnitude stays that of the distance: neither kv nor q alone is multiplied."""
    logits = hoist.arrange(parse("s + load(0, h)*(kv - q)"))
    assert {x.name for x in logits.x.free_symbols} == {"s", "h", "lane"}
    assert {x.name for x in logits.shift.free_symbols} == {"h", "row", "q_start", "kv_start"}


def test_what_keys_do_not_change_goes_to_the_shift():
    logits = hoist.arrange(parse("s + h*3.0 + q*0.5"))
    assert logits.x == S
    assert {x.name for x in logits.shift.free_symbols} == {"h", "q"}


@pytest.mark.parametrize(
    "score",
    [
        "s + load(0, b, kv)",
        "s + load(0, b, h, q, kv)",
        "where(kv - q <= 0, s, -1e38)",
        "s + load(0, q)",
        "s + load(0, h)*3.0",
        "where(kv - q <= 0, s, -5e8)",
        "where(kv - q <= 0, s, 0.5*load(0))",
    ],
)
def test_what_may_hold_a_mask_stays_in_natural_units(score):
    """finfo.min times log2(e) is -inf, and a row of it NaN where eager has the mean."""
    logits = hoist.arrange(parse(score))
    assert not logits.log2 and logits.x == parse(score) and logits.shift == 0


@pytest.mark.parametrize(
    ("mask", "rows"),
    [
        ("kv - q <= 0", "never"),
        ("(kv - q <= 0) | (load(0, kv) != 0)", "never"),
        ("(kv - q <= 0) & (q - kv <= 9)", "long"),
        ("kv - q - Skv + Sq <= 0", "long"),
        ("(kv - q <= 0) & (load(0, b, kv) != 0)", "maybe"),
        ("kv - q <= -1", "maybe"),
        ("q > 3", "maybe"),
    ],
)
def test_dead_rows(mask, rows):
    assert hoist.dead_rows(parse(mask)) == rows


def place(source):
    hoister = hoist.Hoister("t", {})
    placed = hoister.place(parse(source))
    return [
        f"{'' if outside else 'loop: '}{x} = {text(y)}" for outside, x, y in hoister.statements
    ], placed


def test_loads_are_placed_by_what_they_depend_on():
    lines, _ = place("s*load(0, h) + load(1, b, q) + load(2, kv) + load(3, q, kv)")
    assert sorted(x.split(" = ")[1] + x[:5].strip("t0123 =") for x in lines) == [
        "load(0, h)",
        "load(1, b, q)",
        "load(2, kv)loop:",
        "load(3, q, kv)loop:",
    ]


def test_a_mask_compares_a_key_with_a_bound_of_the_row():
    lines, placed = place("q - kv <= 1023")
    assert lines == ["t0 = q - 1023"]
    assert str(placed) == "kv >= t0"
    assert place("kv - q <= 0") == ([], parse("kv <= q"))


def test_a_mask_of_products_stays_as_it_is():
    lines, placed = place("q*kv <= 9")
    assert lines == [] and placed == parse("q*kv <= 9")


def test_the_argument_of_a_series_has_a_name():
    """Its text has the argument nine times, one in another eighty times and more."""
    hoister = hoist.Hoister("x", {})
    score = with_small_digits(parse("log(exp(exp(0.1*s + load(0, b, h, q, kv)) - 1) + 1)"))
    placed = hoister.place(score)
    assert str(placed) == "log1p(x2)"
    assert [str(x) for _, _, x in hoister.statements] == [
        "load(0, b, h, q, kv)", "0.1*s + x0", "exp(expm1(x1))"
    ]  # fmt: skip
