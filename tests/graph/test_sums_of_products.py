"""Scores that are sums of products: one attention over the features side by side."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline

from fa3_compile.lower.kernels.reference import Reference
from tests.graph.harness import check, specs
from tests.graph.inputs import INF, SCALE, B, D, H, S, attend, chance, normal, qkv

R = 8
SOME = chance(0.5, S, S)
PLAIN = "attention(score=0.25*s)"


def rotary(*shape: int):
    """The queries and keys of a second product, [B, H, S, 8]."""
    shape = shape or (B, H, S, R)
    return normal(*shape, seed=11), normal(*shape, seed=12)


def latents():
    """Queries [B, S, H, 16] and [B, S, H, 8], and one head of keys [B, S, 16] and [B, S, 8]."""
    return (
        normal(B, S, H, D, seed=1),
        normal(B, S, H, R, seed=2),
        normal(B, S, D, seed=3),
        normal(B, S, R, seed=4),
    )


def absorbed(q, q_rotary, latent, k_rotary):
    """As DeepSeek's inference code has it: every head reads the one latent, also as V."""
    scores = torch.einsum("bshc,btc->bsht", q, latent)
    scores = (scores + torch.einsum("bshr,btr->bsht", q_rotary, k_rotary)) * SCALE
    mask = torch.full((q.shape[1], q.shape[1]), -INF).triu(1)
    weights = (scores + mask.unsqueeze(1)).softmax(-1, dtype=torch.float32).type_as(q)
    return torch.einsum("bsht,btc->bshc", weights, latent)


@pytest.mark.parametrize("order", ["latent first", "rotary first"])
def test_values_that_are_keys_are_read_with_them(order, monkeypatch):
    """K and V are one tensor, whose first columns are V."""
    seen = []
    run = Reference.run

    def spy(self, problem, q, k, v, *rest):
        seen.append((k.shape[-1], v.data_ptr() == k.data_ptr(), v.stride() == k.stride()))
        return run(self, problem, q, k, v, *rest)

    def attention(q, q_rotary, latent, k_rotary):
        parts = [(q, latent), (q_rotary, k_rotary)]
        a, b = parts if order == "latent first" else parts[::-1]
        scores = [torch.einsum("bshc,btc->bsht", *x) for x in (a, b)]
        weights = ((scores[0] + scores[1]) * SCALE).softmax(-1)
        return torch.einsum("bsht,btc->bshc", weights, latent)

    monkeypatch.setattr(Reference, "run", spy)
    assert specs(check(attention, *latents())) == "attention(score=0.25*s, out_order=bqhd)"
    assert set(seen) == {(D + R, True, True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
def test_absorbed_latent_attention(dynamic, dtype):
    report = check(absorbed, *latents(), dtype=dtype, dynamic=dynamic)
    scale = "load(0)" if dynamic else "0.25"  # a module's float changes, for all Dynamo knows
    assert specs(report).startswith(f"attention(score={scale}*s, mask=kv <= q")


def test_one_rotary_key_for_all_heads():
    def attention(q, k, v, q_rotary, k_rotary):
        scores = torch.einsum("bshd,bthd->bsht", q, k)
        scores = (scores + torch.einsum("bshr,btr->bsht", q_rotary, k_rotary)) * SCALE
        return torch.einsum("bsht,bthd->bshd", scores.softmax(-1), v)

    report = check(attention, *qkv(B, S, H, D), rotary(B, S, H, R)[0], rotary(B, S, R)[1])
    assert_expected_inline(specs(report), """attention(score=0.25*s)""")


def test_grouped_heads():
    def attention(q, k, v, q2, k2):
        k, v, k2 = (x.repeat_interleave(2, 1) for x in (k, v, k2))
        return attend((q @ k.mT + q2 @ k2.mT) * SCALE, v)

    k, v = (normal(B, H // 2, S, D, seed=n) for n in (2, 3))
    report = check(attention, qkv()[0], k, v, rotary()[0], normal(B, H // 2, S, R))
    assert specs(report) == PLAIN


SPELLINGS = {
    "in place": lambda s, t: s.add_(t) * SCALE,
    "alpha": lambda s, t: torch.add(s, t, alpha=2) * SCALE,
    "scaled apart": lambda s, t: s / 4 + t / 4,
    "scaled unequally": lambda s, t: s * 0.3 + t * 0.7,
    "subtracted": lambda s, t: s - t,
    "softcap": lambda s, t: 5 * torch.tanh((s + t) / 5),
    "masked": lambda s, t: (s + t).masked_fill(torch.ones(S, S).triu(1).bool(), -INF),
    "with a bias": lambda s, t: s + torch.arange(S) * 0.1 + t,
    "in float64": lambda s, t: (s.double() + t.double()).float(),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_spelling(spelling):
    report = check(lambda q, k, v, a, b: attend(spelling(q @ k.mT, a @ b.mT), v), *qkv(), *rotary())
    assert report.fused and "load" not in specs(report)


def test_second_product_added_to_by_baddbmm():
    def attention(q, k, v, a, b):
        return attend(torch.baddbmm(q @ k.mT, a, b.mT, beta=0.5, alpha=0.25), v)

    q, k, v = qkv(B * H, S, D)
    report = check(attention, q, k, v, *rotary(B * H, S, R))
    assert_expected_inline(specs(report), """attention(score=0.25*s, out_order=bqhd)""")


def test_three_products():
    def attention(q, k, v, a, b, c, d):
        return attend((q @ k.mT + a @ b.mT + c @ d.mT) * SCALE, v)

    inputs = (*rotary(B, H, S, 3), *rotary(B, H, S, 4))
    assert specs(check(attention, *qkv(), *inputs)) == PLAIN


def test_without_a_softmax():
    def attention(q, k, v, a, b):
        return torch.sigmoid(q @ k.mT + a @ b.mT) @ v

    report = check(attention, *qkv(), *rotary())
    assert_expected_inline(specs(report), """attention(normalize=none, score=sigmoid(s))""")


def test_a_width_that_is_no_multiple_of_eight_is_filled_up():
    def attention(q, k, v, a, b):
        return attend((q @ k.mT + a @ b.mT) * SCALE, v)

    assert specs(check(attention, *qkv(), *rotary(B, H, S, 3))) == PLAIN


def test_scores_added_to_their_transpose():
    def attention(q, k, v):
        s = q @ k.mT
        return attend((s + s.mT) * SCALE, v)

    assert specs(check(attention, *qkv())) == PLAIN


def test_scores_added_to_those_of_another_head():
    def attention(q, k, v):
        s = q @ k.mT
        return attend((s + s[:, :1]) * SCALE, v)

    assert specs(check(attention, *qkv())) == PLAIN


def test_a_sink_beside_them():
    def attention(q, k, v, a, b, sinks):
        s = torch.cat([q @ k.mT + a @ b.mT, sinks.view(1, H, 1, 1).expand(B, H, S, 1)], -1)
        return s.softmax(-1)[..., :-1] @ v

    report = check(attention, *qkv(), *rotary(), normal(H))
    assert_expected_inline(specs(report), """attention(score=s, sinks=[load(0, h)], aux=[float])""")


def test_second_product_is_returned_as_well():
    def attention(q, k, v, a, b):
        t = a @ b.mT
        return attend((q @ k.mT + t) * SCALE, v), t

    assert specs(check(attention, *qkv(), *rotary())) == PLAIN


def test_dropped_weights():
    def attention(q, k, v, a, b):
        return F.dropout(((q @ k.mT + a @ b.mT) * SCALE).softmax(-1), 0.0) @ v

    assert specs(check(attention, *qkv(), *rotary())) == PLAIN


class TestFactors:
    """What one product is multiplied by goes to its queries."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_of_a_head(self, dtype):
        def attention(q, k, v, a, b, gate):
            return attend((q @ k.mT) * SCALE + (a @ b.mT) * gate.view(1, H, 1, 1), v)

        report = check(attention, *qkv(), *rotary(), normal(H), dtype=dtype)
        assert_expected_inline(specs(report), """attention(score=s)""")

    def test_of_a_query(self):
        def attention(q, k, v, a, b, gate):
            gate = torch.sigmoid(gate).unsqueeze(-1)
            return attend(gate * (q @ k.mT) + (1 - gate) * (a @ b.mT), v)

        report = check(attention, *qkv(), *rotary(), normal(B, H, S))
        assert_expected_inline(specs(report), """attention(score=s)""")

    def test_of_both_stays_in_the_score(self):
        def attention(q, k, v, a, b, temperature):
            return attend((q @ k.mT) * temperature + (a @ b.mT) * temperature, v)

        report = check(attention, *qkv(), *rotary(), normal(1, H, 1, 1))
        assert_expected_inline(
            specs(report), """attention(score=load(0, 0, h, 0, 0)*s, aux=[float])"""
        )

    def test_of_a_key_is_none(self):
        def attention(q, k, v, a, b, gate):
            return attend((q @ k.mT) * SCALE + (a @ b.mT) * gate.view(B, 1, 1, S), v)

        report = check(attention, *qkv(), *rotary(), normal(B, S))
        assert report.fused and "load" in specs(report)

    def test_rounded_queries_where_the_program_has_exact_scores(self):
        def attention(q, k, v, a, b):
            scores = (q.float() @ k.float().mT) * 0.3 + (a.float() @ b.float().mT) * 0.7
            return scores.softmax(-1).to(v.dtype) @ v

        inputs = (*qkv(), *rotary())
        assert "load" not in specs(check(attention, *inputs))
        assert "load" in specs(check(attention, *inputs, dtype=torch.bfloat16))


NEAR_MISSES = {
    "keys permuted": lambda s, t: s + t[..., torch.arange(S - 1, -1, -1)],
    "keys rolled": lambda s, t: s + t.roll(1, -1),
    "heads reversed": lambda s, t: s + t.flip(1),
    "one of them changed": lambda s, t: s + torch.tanh(t),
    "multiplied": lambda s, t: s * torch.sigmoid(t),
    "the larger one": torch.maximum,
    "chosen between": lambda s, t: torch.where(SOME, s, t),
    "masked apart": lambda s, t: s + t.masked_fill(SOME, 0.0),
}


@pytest.mark.parametrize("scores", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_no_sum_of_one_query_and_one_key(scores):
    """The second product is a bias of all queries and keys."""
    report = check(
        lambda q, k, v, a, b: attend(scores(q @ k.mT * SCALE, a @ b.mT), v), *qkv(), *rotary()
    )
    assert report.fused and "load" in specs(report)


def test_keys_of_another_product():
    """k' is made of the first product, which is a bias then, and another attention's scores."""

    def attention(q, k, v, a):
        s = q @ k.mT * SCALE
        return attend(s + a @ (s.softmax(-1) @ v).mT, v)

    report = check(attention, *qkv(), normal(B, H, S, D, seed=5))
    assert_expected_inline(
        specs(report),
        """\
attention(score=0.25*s)
attention(score=0.25*load(0, b, h, q, kv) + s, aux=[float])""",
    )


def test_few_queries():
    """In decoding, scores are smaller than keys, and the keys' caches are not copied."""

    def attention(q, k, v, a, b):
        return attend((q @ k.mT + a @ b.mT) * SCALE, v)

    q, k, v = normal(B, H, 1, D), *qkv()[1:]
    report = check(attention, q, k, v, normal(B, H, 1, R), rotary()[1])
    assert_expected_inline(
        specs(report), """attention(score=0.25*load(0, b, h, 0, kv) + 0.25*s, aux=[float])"""
    )


def test_keys_written_in_between():
    def attention(q, k, v, a, b):
        s = q @ k.mT + a @ b.mT
        b = b.mul_(2)
        return attend(s * SCALE, v), b

    inputs = (x.detach() for x in (*qkv(), *rotary()))
    report = check(attention, *inputs)
    assert_expected_inline(
        specs(report), """attention(score=0.25*load(0, b, h, q, kv) + 0.25*s, aux=[float])"""
    )


def test_no_kernel_for_them_together(monkeypatch):
    def narrow(self, problem):
        return f"the head dim is {problem.dim}" if problem.dim > D else None

    monkeypatch.setattr(Reference, "supports", narrow)
    report = check(
        lambda q, k, v, a, b: attend((q @ k.mT + a @ b.mT) * SCALE, v), *qkv(), *rotary()
    )
    assert "load" in specs(report)
    assert "as one product they have no kernel" in report.regions[0].hint


@pytest.mark.parametrize("spelling", ["gated", "shared", "expanded"])
def test_product_in_two_terms(spelling):
    # sympy adds 2*s and s up, but not s and gate*s.
    def attention(q, k, v, q_rotary, k_rotary, gate, other):
        s, r = q @ k.mT, q_rotary @ k_rotary.mT
        scores = {
            "gated": s + gate * s + r,
            "shared": gate * (s + r) + other * s,
            "expanded": (s + r * gate) * gate + s * gate * (1 - gate),
        }[spelling]
        return (scores * SCALE).softmax(-1) @ v

    gates = normal(1, H, 1, 1, seed=5), normal(1, H, 1, 1, seed=6)
    check(attention, *qkv(), *rotary(), *gates)
