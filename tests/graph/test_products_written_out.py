"""Products of several tensors in one call."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.graph.harness import check, specs
from tests.graph.inputs import SCALE, D, H, attend, normal, qkv, weights_of

PLAIN = "attention(score=0.25*s)"
PROJECTION = normal(H, D, D, seed=4)


def projected(q, k, v, w):
    return torch.einsum("bhqk,bhkd,hde->bqe", weights_of(q, k), v, w)


def projected_by_the_rule_for_results(q, k, v, w):
    return torch.einsum("...qk, ...kd, de", weights_of(q, k), v, w[0])


def projected_as_a_list(q, k, v, w):
    return torch.einsum("bhqk,bhkd,hde->bhqe", [weights_of(q, k), v, w])


def gated(q, k, v, w):
    return torch.einsum("bhqk,bhkd,bhqd->bhqd", weights_of(q, k), v, q)


def scores_by_two_projections(q, k, v, w):
    scores = torch.einsum("bhqd,hde,hfe,bhkf->bhqk", q, w * SCALE, w, k)
    return attend(scores * SCALE, v)


@pytest.mark.parametrize(
    "attention",
    [projected, projected_by_the_rule_for_results, projected_as_a_list, gated],
    ids=lambda f: f.__name__,
)
def test_einsum_of_three(attention):
    assert specs(check(attention, *qkv(), PROJECTION)) == PLAIN


def test_einsum_of_four():
    assert specs(check(scores_by_two_projections, *qkv(), PROJECTION)) == PLAIN


def test_lengths_that_change():
    assert specs(check(projected, *qkv(), PROJECTION, dynamic=True)).startswith("attention(")


def test_the_order_that_opt_einsum_finds(monkeypatch):
    """Both projections first, of which one matrix is left."""
    order = [(1, 2), (0, 2), (0, 1)]
    stand_in = SimpleNamespace(contract_path=lambda *_, **__: (order, ""))
    monkeypatch.setattr(torch.backends.opt_einsum, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.opt_einsum, "get_opt_einsum", lambda: stand_in)
    assert specs(check(scores_by_two_projections, *qkv(), PROJECTION)) == PLAIN


def test_autocast():
    def attention(q, k, v, w):
        with torch.autocast("cpu", torch.bfloat16):
            return projected(q, k, v, w)

    assert len(check(attention, *qkv(), PROJECTION, training=False).fused) == 1


def test_under_vmap():
    """The letters are those of one batch element."""

    def one(q, k, v, w):
        return torch.einsum("hqk,hkd,hde->hqe", weights_of(q, k), v, w)

    def attention(q, k, v, w):
        return torch.vmap(one, (0, 0, 0, None))(q, k, v, w)

    check(attention, *qkv(), PROJECTION)


def test_weights_that_meet_the_queries():
    def attention(q, k, v, w):
        return torch.einsum("bhqk,bhqd,hde->bke", weights_of(q, k), v, w)

    assert specs(check(attention, *qkv(), PROJECTION)) == "detect: softmax-axis"
