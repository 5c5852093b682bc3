"""Where the parts of a score are computed, and how it is arranged for the online softmax."""

import math

import numpy as np
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


TWICE = "max(20.0*s + load(0, b, h, q, kv), 0) - 10.0*s - 0.5*load(0, b, h, q, kv)"


def test_a_sum_that_occurs_twice_is_one_number():
    """relu(x) - 0.5 x of x = 20 s + bias: the halves of x are not rounded each for itself."""
    score = hoist.arrange(parse(TWICE)).x
    lines, placed = placed_in_loop(score)
    assert lines == ["load(0, b, h, q, kv)", "20.0*s + t0"]
    assert str(placed) == "-0.5*t1 + Max(0, t1)"


@pytest.mark.parametrize(
    "score",
    [
        "max(20.0*s + load(0, b, h, q, kv), 0) - 10.0*s - 0.25*load(0, b, h, q, kv)",
        "max(20.0*s + load(0, b, h, q, kv), 0) - 10.0*s",
        "max(20.0*s + load(0, b, h, q, kv), 0) + tanh(s) + load(0, b, h, q, kv)",
        "20.0*s + load(0, b, h, q, kv)",
    ],
)
def test_other_sums_stay_as_they_are(score):
    assert hoist.plain(parse(score)).x == parse(score)


@pytest.mark.parametrize("c", [0.5, 0.3, 0.9])
def test_what_is_left_of_a_sum_has_its_roundings(c):
    """In float32, as a kernel computes it, without its products in one instruction: products that
    are rounded apart are 1.4 to 1.6 times as far from float64 as the program is."""
    source = f"max(1.7*s + 1.7*load(0), 0) - {1.7 * c}*s - {1.7 * c}*load(0)"
    lines, placed = placed_in_loop(hoist.plain(parse(source)).x, {"load(0)": "y"})
    rng = np.random.default_rng(0)
    s, y = (rng.normal(size=4096) * 500 for _ in range(2))
    values = {"s": np.float32(s), "y": np.float32(y), "Max": np.maximum}
    for i, line in enumerate(lines):
        values[f"t{i}"] = eval(line, {}, values)
    x = np.float32(1.7) * (np.float32(s) + np.float32(y))
    eager = np.maximum(x, 0) - np.float32(c) * x
    x = float(np.float32(1.7)) * (np.float32(s).astype(float) + np.float32(y))
    right = np.maximum(x, 0) - c * x
    ours = np.asarray(eval(str(placed), {}, values), np.float32)
    far, allowed = (np.sqrt(np.mean((z - right) ** 2)) for z in (ours, eager))
    assert far <= 1.1 * allowed


def placed_in_loop(score, names=()):
    hoister = hoist.Hoister("t", {})
    placed = hoister.place(score)
    lines = [text(x) for _, _, x in hoister.statements]
    return [dict(names).get(x, x) for x in lines], placed


def test_the_argument_of_a_series_has_a_name():
    """Its text has the argument nine times, one in another eighty times and more."""
    hoister = hoist.Hoister("x", {})
    score = with_small_digits(parse("log(exp(exp(0.1*s + load(0, b, h, q, kv)) - 1) + 1)"))
    placed = hoister.place(score)
    assert str(placed) == "log1p(x2)"
    assert [str(x) for _, _, x in hoister.statements] == [
        "load(0, b, h, q, kv)", "0.1*s + x0", "exp(expm1(x1))"
    ]  # fmt: skip
