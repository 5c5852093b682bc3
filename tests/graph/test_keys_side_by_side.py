"""Keys of several products under one softmax: one attention over the keys side by side."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline

from tests.graph.harness import check, specs
from tests.graph.inputs import INF, B, D, H, S, attend, normal, qkv, scores_of

M = 7
MORE = normal(B, H, M, D, seed=4), normal(B, H, M, D, seed=5)


def joint(q, k, v, local, value):
    return attend(torch.cat([scores_of(q, k), scores_of(q, local)], -1), torch.cat([v, value], -2))


def weights_of(q, k, local):
    return torch.cat([scores_of(q, k), scores_of(q, local)], -1).softmax(-1)


def apart(q, k, v, local, value):
    w = weights_of(q, k, local)
    return w[..., :S] @ v + w[..., S:] @ value


def later_keys_first(q, k, v, local, value):
    w = weights_of(q, k, local)
    return w[..., S:] @ value + w[..., :S] @ v


def three(q, k, v, local, value):
    scores = [scores_of(q, local), q @ k.mT, scores_of(q, local.cos())]
    a, b, c = torch.cat(scores, -1).softmax(-1).split([M, S, M], -1)
    return a @ value + (b @ v + c @ value)


FUSED = {
    joint: "attention(score=0.25*s)",
    apart: "attention(score=0.25*s)",
    later_keys_first: "attention(score=0.25*s)",
    three: "attention(score=where(kv <= 6, 0.25*s, where(kv <= 30, s, 0.25*s)))",
}


@pytest.mark.parametrize("function", FUSED, ids=lambda f: f.__name__)
def test_one_attention(function):
    assert specs(check(function, *qkv(), *MORE)) == FUSED[function]


@pytest.mark.parametrize("function", [joint, apart], ids=lambda f: f.__name__)
def test_lengths_that_change(function):
    report = check(function, *qkv(), *MORE, dynamic=True)
    assert specs(report) == "attention(score=load(0)*s, aux=[float])"


def test_memory_of_heads_before_causal_keys():
    """Persistent memory (Sukhbaatar et al. 2019), which every query sees, with keys of groups."""

    def attention(q, k, v, memory, recalled):
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        past = scores_of(q, k).masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -INF)
        scores = torch.cat([torch.einsum("bhqd,hmd->bhqm", q, memory), past], -1)
        return attend(scores, torch.cat([recalled.expand(B, -1, -1, -1), v], -2))

    k, v = (normal(B, H // 2, S, D, seed=n) for n in (2, 3))
    report = check(attention, qkv()[0], k, v, normal(H, 3, D, seed=4), normal(H, 3, D, seed=5))
    assert_expected_inline(
        specs(report),
        """attention(score=where(kv <= 2, s, 0.25*s), mask=(kv <= 2) | (kv <= q + 3), dead=nan)""",
    )


def test_one_key_for_every_query():
    def attention(q, k, v, null, value):
        scores = torch.cat([q @ null.unsqueeze(-1), scores_of(q, k)], -1)
        return attend(scores, torch.cat([value.expand(B, -1, -1, -1), v], -2))

    report = check(attention, *qkv(), normal(H, D, seed=4), normal(H, 1, D, seed=5))
    assert_expected_inline(specs(report), """attention(score=where(kv <= 0, s, 0.25*s))""")


def test_single_keys_in_the_order_of_the_scores():
    def attention(q, k, first, last, v):
        return attend(torch.cat([q @ first.mT, scores_of(q, k), q @ last.mT], -1), v)

    single = normal(B, H, 1, D, seed=4), normal(B, H, 1, D, seed=5)
    report = check(attention, *qkv()[:2], *single, normal(B, H, S + 2, D, seed=6))
    assert_expected_inline(
        specs(report), """attention(score=where(kv <= 0, s, where(kv <= 24, 0.25*s, s)))"""
    )


def test_a_product_of_one_key_added_to_all_is_no_key():
    def attention(q, k, u, local, v):
        scores = [q @ k.mT + q @ u.mT, torch.zeros(B, H, S, 1), q @ local.mT]
        return attend(torch.cat(scores, -1), v)

    u, v = normal(B, H, 1, D, seed=6), normal(B, H, S + 1 + M, D, seed=7)
    check(attention, *qkv()[:2], u, MORE[0], v)


def test_v_in_parts_summed_in_a_loop():
    """The first product is the last addend."""

    def attention(q, k, v):
        w = scores_of(q, k).softmax(-1)
        out = 0
        for i in range(0, S, 8):
            out = w[..., i : i + 8] @ v[..., i : i + 8, :] + out
        return out

    assert specs(check(attention, *qkv())) == "attention(score=0.25*s)"


def test_v_in_parts_summed_by_python():
    """Whose `sum` begins with the number 0."""

    def attention(q, k, v):
        w = scores_of(q, k).softmax(-1)
        return sum(w[..., i : i + 8] @ v[..., i : i + 8, :] for i in range(0, S, 8))

    assert specs(check(attention, *qkv())) == "attention(score=0.25*s)"


def test_v_in_parts_of_one_product():
    def attention(q, k, v, value):
        w = scores_of(q, k).softmax(-1)
        return w[..., :M] @ value + w[..., M:] @ v[..., M:, :]

    assert specs(check(attention, *qkv(), MORE[1])) == "attention(score=0.25*s)"


def blocks_and_keys_of_all(q, k, v, of_all, value, blocks=slice(None)):
    """BigBird (Zaheer et al. 2020): keys of the query's own block of 16, and some that all see."""
    scores = torch.einsum("bhnqd,bhkd->bhnqk", q, of_all), torch.einsum("bhnqd,bhnkd->bhnqk", q, k)
    w = torch.cat(scores, -1).softmax(-1)
    own = torch.einsum("bhnqk,bhnkd->bhnqd", w[..., 12:][:, :, blocks], v)
    return torch.einsum("bhnqk,bhkd->bhnqd", w[..., :12], value) + own


BLOCKS = *qkv(2, 2, 3, 16, 4), normal(2, 2, 12, 4, seed=4), normal(2, 2, 12, 4, seed=5)


def test_keys_of_blocks_and_keys_of_all():
    assert specs(check(blocks_and_keys_of_all, *BLOCKS)) == "attention(score=s)"


def test_weights_of_other_blocks():
    report = check(blocks_and_keys_of_all, *BLOCKS, torch.tensor([1, 2, 0]))
    assert [x.fused for x in report.regions] == [False]


def test_weights_that_are_returned_too():
    def attention(q, k, v, local, value):
        w = weights_of(q, k, local)
        return w[..., :S] @ v + w[..., S:] @ value, w

    report = check(attention, *qkv(), *MORE)
    assert report.fused and "computed once more" in report.regions[0].hint


def test_few_queries_are_not_worth_a_copy_of_the_keys():
    """A step of decoding, whose cache and new key the program keeps apart."""
    q, k, v = qkv()
    assert specs(check(joint, q[:, :, :2], k, v, *MORE)) == "choose: products-apart"
    assert not check(apart, q[:, :, :2], k, v, *MORE).fused


def other_queries(q, k, v, local, value):
    scores = torch.cat([scores_of(q, k), scores_of(q.sin(), local)], -1)
    return attend(scores, torch.cat([v, value], -2))


def a_key_left_out(q, k, v, local, value):
    w = weights_of(q, k, local)
    return w[..., : S - 1] @ v[..., :-1, :] + w[..., S:] @ value


def a_key_twice(q, k, v, local, value):
    w = weights_of(q, k, local)
    return w[..., : S + 1] @ torch.cat([v, v[..., :1, :]], -2) + w[..., S:] @ value


def parts_weighed_apart(q, k, v, local, value):
    w = weights_of(q, k, local)
    return w[..., :S] @ v + (2 * w[..., S:]) @ value


def parts_with_factors_of_rows(q, k, v, local, value):
    w = weights_of(q, k, local)
    return (w[..., :S] * q[..., :1]) @ v + (w[..., S:] * q[..., 1:2].cos()) @ value


def parts_of_other_rows(q, k, v, local, value):
    w = weights_of(q, k, local)
    return w[..., :S] @ v + w.flip(1)[..., S:] @ value


def keys_of_both(q, k, v, local, value):
    scores = torch.where(torch.arange(S) < M, scores_of(q, k), scores_of(q, v))
    return attend(scores, v)


def parts_of_two_softmaxes(q, k, v, local, value):
    w, u = weights_of(q, k, local), weights_of(q, v, local)
    return w[..., :S] @ v + u[..., S:] @ value


@pytest.mark.parametrize(
    ("function", "code"),
    [
        (other_queries, "queries-apart"),
        (a_key_left_out, "weights-partly-used"),
        (a_key_twice, "weights-partly-used"),
        (parts_weighed_apart, "weights-partly-used"),
        (parts_with_factors_of_rows, "weights-partly-used"),
        (parts_of_other_rows, "weights-partly-used"),
        (parts_of_two_softmaxes, "weights-partly-used"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_left_alone(function, code):
    regions = check(function, *qkv(), *MORE).regions
    assert {x.code for x in regions} == {code}


def test_parts_that_cost_more_to_copy_than_the_scores_say_so():
    def memories_of_each_query(q, k, v, local, value):
        own = torch.einsum("bhqd,bhqmd->bhqm", q, local)
        w = torch.cat([own, q @ k.mT], -1).softmax(-1)
        return torch.einsum("bhqm,bhqmd->bhqd", w[..., :M], value) + w[..., M:] @ v

    memories = (normal(B, H, S, M, D, seed=7), normal(B, H, S, M, D, seed=8))
    regions = check(memories_of_each_query, *qkv(), *memories).regions
    assert {x.code for x in regions} == {"products-apart"}


def test_keys_of_two_products_at_one_place_keep_their_own():
    check(keys_of_both, *qkv(), *MORE)
