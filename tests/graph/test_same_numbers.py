"""What is read or computed in a kernel is the number that the program has: infinities, narrow
integers, float64, steps of rounded quotients, random numbers, rows of tables without gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fa3_compile.frontend.shadow.same import is_random
from fa3_compile.options import Options
from fa3_compile.pipeline import rewrite_attention
from fa3_compile.testing import assert_matches_eager
from tests.graph.harness import check, specs
from tests.graph.inputs import INF, H, S, attend, chance, normal, qkv, scores_of, uniform

AT = torch.arange(S)
FLAGS = chance(0.7, S, seed=1).to(torch.uint8)
UNKNOWN = uniform(S, S, seed=3).masked_fill(AT == 3, torch.nan)
BYTES = torch.tensor([200, 10, 20, 90, 120, 250]).to(torch.uint8).repeat(4)
SIGNED = torch.tensor([100, 10, -128, 90, 120, -100]).to(torch.int8).repeat(4)
INFINITE = normal(S, S).detach().masked_fill(AT[:, None] < AT, -INF)
SECONDS = 1.7e9 + 200 * uniform(S, seed=2).double()
TENTHS = torch.tensor([1.0, 0.3, 0.9, 0.6, 3.0, 0.7]).repeat(4)
AGES = torch.tensor([0, 41, 82, 40, 81, 123]).repeat(4)


def distance(x):
    return x[:, None] - x[None, :]


# name -> (scores and something captured -> scores, what is captured)
READS = {
    "quotient by 0.1, rounded down": (lambda s, t: s + (t // 0.1) * 0.1, TENTHS),
    "floor of a quotient by 0.1": (lambda s, t: s + (t / 0.1).floor() * 0.1, TENTHS),
    "floor of a quotient of two": (
        lambda s, t: s + (t[:, None] / t.clamp(min=0.1)).floor(),
        TENTHS,
    ),
    "zeros times their reciprocals": (
        lambda s, t: s + t.square() * t.reciprocal(),
        TENTHS * (AT > 0),
    ),
    "exp of log": (lambda s, t: s + t.log().exp().nan_to_num(), TENTHS - 0.5),
    "equal to -inf": (lambda s, b: s.masked_fill(b == -INF, -INF), INFINITE),
    "isneginf": (lambda s, b: s.masked_fill(torch.isneginf(b), -INF), INFINITE),
    "beyond -inf": (lambda s, b: s.masked_fill(~(b > -INF), -INF), INFINITE),
    "isfinite": (lambda s, b: torch.where(torch.isfinite(b), s + b, -INF), INFINITE),
    "not at most": (lambda s, w: torch.where(w <= 0.5, -INF, s), UNKNOWN),
    "bytes less one": (lambda s, m: s + (m - 1).float() * 1e-2, FLAGS),
    "negated bytes": (lambda s, m: s + (-m).float() * 1e-2, FLAGS),
    "sum of bytes": (lambda s, x: s.masked_fill(x[:, None] + x < 100, -INF), BYTES),
    "product of bytes": (lambda s, x: s + (x[:, None] * x).float() * 1e-2, SIGNED),
    "size of the lowest byte": (lambda s, x: s + x.abs() * 1e-2, SIGNED),
    "shifted bytes": (lambda s, x: s + (x << 3) * 1e-2, SIGNED),
    "bytes less than -1": (lambda s, x: s.masked_fill(x < -1, -2.0), FLAGS),
    "bytes other than 256": (lambda s, x: s.masked_fill(x != 256, -2.0), FLAGS),
    "small integers below 200": (lambda s, x: s.masked_fill(x < 200, -2.0), SIGNED),
    "bytes from -1 on": (lambda s, x: s + x.clamp(min=-1) * 0.01, FLAGS),
    "a quotient by 300 of bytes": (lambda s, x: s + (x // 300) * 0.1, BYTES),
    "bytes beside a lone number": (lambda s, x: s.masked_fill(x < torch.tensor(-1), -2.0), FLAGS),
    "integers below 2**31": (lambda s, x: s.masked_fill(x < 2**31, -2.0), AT.int()),
    "cast to bytes": (lambda s, x: s.masked_fill(distance(x).to(torch.uint8) > 3, -INF), AT),
    "positions that are bytes": (
        lambda s, x: s.masked_fill(distance(torch.arange(S, dtype=torch.uint8)) > 20, -INF),
        AT,
    ),
    "32 bits": (lambda s, x: s + 1e-10 * ((x.int()[:, None] + x.int()) * 1000000007), AT),
    "beyond 32 bits": (
        lambda s, x: s.masked_fill((AT[:, None] * 200000003 + x * 100000007) % 97 > 50, -INF),
        AT,
    ),
    "products beyond 32 bits": (
        lambda s, x: s.masked_fill((x.long()[:, None] * x.long()) % 3 == 2, -INF),
        (AT + 2**20).int(),
    ),
    "positions in products": (
        lambda s, x: s + ((torch.arange(S) ** 2 * 90000001 + x) % 5) * 0.1,
        AT,
    ),
    "differences in float64": (lambda s, t: s.masked_fill(distance(t).abs() > 60, -INF), SECONDS),
    "equality in float64": (lambda s, t: s.masked_fill(distance(t) != 0, -INF), SECONDS),
    "uint16": (
        lambda s, t: s.masked_fill(distance(t.long()) > 0, -INF),
        (2900 * AT).to(torch.uint16),
    ),
    "uint32": (
        lambda s, t: s.masked_fill((t.long()[:, None] + t.long()) % 3 == 2, -INF),
        (2**31 + 2**27 * AT).to(torch.uint32),
    ),
    "uint64": (
        lambda s, t: s + 1e-20 * t.float() - 0.1 * (t == t[3]),
        (AT - 4).to(torch.uint64),
    ),
    "positions in uint16": (
        lambda s, x: s + 1e-5 * (torch.arange(S) - 4).to(torch.uint16).float() + 0.01 * x,
        AT,
    ),
    "floor of a quotient": (
        lambda s, t: s.masked_fill(distance((t / 41).floor()) != 0, -INF),
        AGES,
    ),
    "large ids that are added": (
        lambda s, t: s.masked_fill((t.long()[:, None] + t.long()) % 3 == 2, -INF),
        (AT + 2**31 - S).int(),
    ),
    "large ids that are negated": (lambda s, t: s + (-t.long() // 7) * 1e-9, (AT - 2**31).int()),
    "floats as large ids": (
        lambda s, t: s + (t.long() % 7) * 0.1,
        1e10 * uniform(S, seed=4),
    ),
    "infinity less itself": (lambda s, b: s + (b - b), INFINITE),
    "most of infinity": (lambda s, b: s + (b - b / 2), INFINITE),
    "nothing of infinity": (lambda s, b: s + 0.0 * b, INFINITE),
    "a quotient of itself": (lambda s, t: s + t / t, AT),
    "bound of a quotient": (lambda s, t: s.masked_fill((t / 41 < 1) & (AT > 3), -INF), AGES),
}


@pytest.mark.parametrize("name", READS)
def test_read_as_the_program_has_it(name):
    change, captured = READS[name]
    report = check(lambda q, k, v, x: attend(change(scores_of(q, k), x), v), *qkv(), captured)
    assert len(report.fused) == 1, specs(report)
    assert "load" in report.fused[0].spec


def test_bytes_that_fit_are_computed():
    def attention(q, k, v):
        hidden = (distance(torch.arange(S)) < 0).to(torch.uint8)
        return attend(scores_of(q, k) + (1 - hidden) * 0.5, v)

    assert "load" not in specs(check(attention, *qkv()))


COMPUTED = {
    "ids that are compared": (lambda s, t: s.masked_fill(t[:, None].long() != t.long(), -INF), AT.int() // 5),
    "positions of one row": (lambda s, t: s.masked_fill(AT - AT[:, None] + t > 0, -INF), AT.int()[3:4]),
    "bytes beside numbers that they hold": (lambda s, x: s.masked_fill((x[:, None] < 1) & (x == 0) & (AT[:, None] < AT), -INF), FLAGS),
    "bytes less themselves": (lambda s, t: s.masked_fill((t.long() - t.long() + AT) > AT[:, None], -INF), FLAGS),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPUTED)
def test_what_is_safe_is_computed(name):
    change, captured = COMPUTED[name]
    report = check(lambda q, k, v, x: attend(change(scores_of(q, k), x), v), *qkv(), captured)
    assert "mask=" in specs(report) and "q, kv)" not in specs(report)


def test_infinite_scores_are_masked_scores():
    def attention(q, k, v):
        scores = scores_of(q, k).masked_fill(distance(torch.arange(S)) < 0, -INF)
        return attend(scores.masked_fill(scores == -INF, -INF), v)

    assert "mask=kv <= q" in specs(check(attention, *qkv()))


@pytest.mark.parametrize("settings", [{"padding_idx": 2}, {"scale_grad_by_freq": True}])
def test_gradient_of_a_table(settings):
    def attention(q, k, v, table):
        bias = F.embedding(distance(AT).clamp(-2, 2) + 2, table, **settings)
        return attend(scores_of(q, k) + bias.permute(2, 0, 1), v)

    assert len(check(attention, *qkv(), normal(5, H)).fused) == 1


def test_logsumexp_of_shifted_scores():
    def attention(q, k, v):
        scores = scores_of(q, k)
        shifted = scores - scores.amax(-1, keepdim=True)
        return attend(shifted, v), shifted.logsumexp(-1)

    assert len(check(attention, *qkv()).fused) == 1


OVERFLOWING = {
    "product": (torch.float16, lambda m: (1.0 - m) * -1e9),
    "float32's lowest": (torch.bfloat16, lambda m: (1.0 - m) * torch.finfo(torch.float32).min),
    "cast": (torch.float16, lambda m: ((1.0 - m.float()) * -1e5).to(m.dtype)),
    "cast of a select": (torch.float16, lambda m: torch.where(m == 0, -1e5, 0.0).to(m.dtype)),
}


@pytest.mark.parametrize("name", OVERFLOWING)
def test_fills_that_half_precision_does_not_hold(name):
    """A row without keys is NaN then, and not the mean of V."""
    dtype, mask = OVERFLOWING[name]
    seen = torch.stack([FLAGS, torch.zeros_like(FLAGS)])[:, None, None].to(dtype)

    def attention(q, k, v, seen):
        return attend(scores_of(q, k) + mask(seen), v)

    tensors = [x.detach().to(dtype) for x in qkv()]
    assert len(check(attention, *tensors, seen, training=False).fused) == 1


def test_products_within_32_bits_are_computed():
    def attention(q, k, v):
        at = torch.arange(S)
        return attend(scores_of(q, k) + ((at[:, None] * at * 1000) % 7) * 0.1, v)

    assert "load" not in specs(check(attention, *qkv()))


NOT_EQUAL_TO_ITSELF = {
    "where": lambda p: torch.where(p != p, 0.0, p),
    "masked_fill": lambda p: p.masked_fill(p != p, 0.0),
}


@pytest.mark.parametrize("name", NOT_EQUAL_TO_ITSELF)
def test_weights_that_are_not_themselves(name):
    """The weights of rows without keys are NaN."""
    hidden = torch.arange(S)[:, None] < 3

    def attention(q, k, v, hidden):
        p = scores_of(q, k).masked_fill(hidden, -INF).softmax(-1)
        return NOT_EQUAL_TO_ITSELF[name](p) @ v

    assert "dead=zero" in specs(check(attention, *qkv(), hidden))


UNDONE = {
    "log of exp": lambda s: (200 * s).exp().log(),
    "exp of log": lambda s: s.log().exp(),
    "square of sqrt": lambda s: s.sqrt() ** 2,
}


@pytest.mark.parametrize("name", UNDONE)
def test_functions_that_overflow_before_they_are_undone(name):
    report = check(lambda q, k, v: attend(UNDONE[name](scores_of(q, k)), v), *qkv(), training=False)
    assert not report.fused


def test_a_score_divided_by_itself():
    """0 / 0 where a query is nothing but zeros."""
    q, k, v = qkv()
    q = (q.detach() * (AT != 2)[:, None]).requires_grad_()
    divided = lambda q, k, v: attend((s := scores_of(q, k)) + s / s, v)  # noqa: E731
    assert not check(divided, q, k, v, training=False).fused


COMPARED_WITH_NAN = {
    "relu": lambda p: F.relu(p - 0.05),
    "clamp": lambda p: p.clamp(max=3.0),
    "maximum": lambda p: torch.maximum(p, 0.3 * p),
    "what was one": lambda p: F.relu(p - 0.05).nan_to_num(),
}


@pytest.mark.parametrize("name", COMPARED_WITH_NAN)
def test_silu_of_a_masked_score_is_nan(name):
    """0 * -inf; what compares it is left to PyTorch, without an error."""
    hidden = distance(torch.arange(S)) < 0

    def attention(q, k, v):
        return COMPARED_WITH_NAN[name](F.silu(scores_of(q, k).masked_fill(hidden, -INF))) @ v

    assert not check(attention, *qkv(), training=False).fused


COMPARED_WITH_ITSELF = {
    "weights that are": lambda s: torch.where((p := s.softmax(-1)) == p, p, 0.0),
    "finite weights": lambda s: torch.where((p := s.softmax(-1)).isfinite(), p, 0.0),
    "scores": lambda s: torch.where(s != s, 0.0, s).softmax(-1),
}


@pytest.mark.parametrize("name", COMPARED_WITH_ITSELF)
def test_other_comparisons_with_itself_are_left(name):
    hidden = torch.arange(S)[:, None] < 3

    def attention(q, k, v, hidden):
        return COMPARED_WITH_ITSELF[name](scores_of(q, k).masked_fill(hidden, -INF)) @ v

    assert specs(check(attention, *qkv(), hidden)) == "lift: not-pointwise"


@pytest.mark.parametrize(
    "change", [lambda s, x: s * INF, lambda s, x: torch.where(x, s, torch.nan)]
)
def test_constants_that_make_nan_are_left(change):
    report = check(lambda q, k, v, x: attend(change(scores_of(q, k), x), v), *qkv(), FLAGS.bool())
    assert [x.code for x in report.regions] == ["not-a-number"]


@pytest.mark.parametrize("draw", ["exponential_", "uniform_", "normal_", "log_normal_", "cauchy_"])
def test_a_number_that_is_drawn_is_read(draw):
    def attention(q, k, v):
        return attend(scores_of(q, k) * getattr(torch.zeros(1), draw)().abs(), v)

    assert "load(0, 0)" in specs(check(attention, *qkv()))


def test_operators_that_draw_are_known():
    graph = torch.fx.Graph()
    aten = torch.ops.aten
    for target in (aten.poisson.default, aten.randn.default, aten.empty_like.default):
        assert is_random(graph.call_function(target))
    assert not is_random(graph.call_function(aten.zeros_like.default))


ROUNDED = {
    "scores": lambda q, k, v: attend(scores_of(q, k).bfloat16().float(), v),
    "weights": lambda q, k, v: scores_of(q, k).softmax(-1).half().float() @ v,
    "softmax": lambda q, k, v: scores_of(q, k).softmax(-1, dtype=torch.bfloat16).to(v.dtype) @ v,
}


@pytest.mark.parametrize("name", ROUNDED)
def test_roundings_that_the_program_asks_for(name):
    assert specs(check(ROUNDED[name], *qkv())) == "lift: not-pointwise"


def test_weights_rounded_to_the_type_of_v():
    q, k, v = qkv(dtype=torch.bfloat16)
    report = check(lambda q, k, v: (q.float() @ k.float().mT).softmax(-1).to(v.dtype) @ v, q, k, v)
    assert len(report.fused) == 1


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_torchs_default_dtype_rounds_nothing(default):
    def attention(q, k, v, gate):
        hidden = (distance(AT) < 0) | (AT[:, None] < 2)
        scores = scores_of(q, k).masked_fill(hidden, torch.finfo(torch.float32).min)
        return attend(scores, v) * (gate * 0.333 + 0.1)

    def rewrite(gm, example_inputs):
        rewrite_attention(gm, Options(kernels=("cpu", "reference"), strict=True), "graph")
        return gm

    inputs, before = (*qkv(), normal(H, 1, 1)), torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        report = assert_matches_eager(attention, *inputs, backend=rewrite, training=True)
    finally:
        torch.set_default_dtype(before)
    assert report.fused[0].kernel == "cpu"
