"""Batch norms between the two products: element-wise by running statistics, and not in training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.graph.harness import check, specs
from tests.graph.inputs import INF, PLAIN, B, H, S, attend, future, qkv, scores_of, weights_of

NORMED = "(0.25*s - load(0, {0}))*load(2, {0})*pow(load(1, {0}) + 1e-05, -0.5) + load(3, {0})"
Between = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """With a norm somewhere between the two products, whose statistics are none of a new layer's."""

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d, between: Between):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.norm, self.between = norm, between
        for x in norm.state_dict().values():
            if x.is_floating_point():
                x.uniform_(0.5, 2, generator=generator)

    def forward(self, q, k, v):
        return self.between(self.norm, q, k, v)


def of_heads(norm, q, k, v):
    return attend(norm(scores_of(q, k)), v)


def of_keys(norm, q, k, v):
    s = norm(scores_of(q, k).flatten(0, 1).mT).mT
    return attend(s.unflatten(0, (B, H)), v)


def masked_before(norm, q, k, v):
    return attend(norm(scores_of(q, k).masked_fill(future(), -INF)), v)


def test_scores_of_each_head():
    report = check(Attention(nn.BatchNorm2d(H), of_heads).eval(), *qkv())
    assert (
        specs(report) == f"attention(score={NORMED.format('h')}, aux=[float, float, float, float])"
    )


def test_scores_of_each_key():
    report = check(Attention(nn.BatchNorm1d(S), of_keys).eval(), *qkv())
    assert (
        specs(report) == f"attention(score={NORMED.format('kv')}, aux=[float, float, float, float])"
    )


def test_statistics_alone():
    report = check(Attention(nn.BatchNorm2d(H, affine=False), of_heads).eval(), *qkv())
    assert (
        specs(report)
        == "attention(score=(0.25*s - load(0, h))*pow(load(1, h) + 1e-05, -0.5), aux=[float, float])"
    )


def test_masks_before_a_norm():
    # The norm's factor may be negative: what is masked may be inf.
    assert len(check(Attention(nn.BatchNorm2d(H), masked_before).eval(), *qkv()).fused) == 1


def test_half_precision():
    half = (x.detach().bfloat16().requires_grad_() for x in qkv())
    assert len(check(Attention(nn.BatchNorm2d(H).bfloat16(), of_heads).eval(), *half).fused) == 1


AROUND = {
    "weights": (H, lambda norm, q, k, v: norm(weights_of(q, k)) @ v),
    "operands": (H, lambda norm, q, k, v: attend(scores_of(norm(q), k), norm(v))),
    "the output": (H, lambda norm, q, k, v: norm(attend(scores_of(q, k), v))),
}


@pytest.mark.parametrize("name", AROUND)
def test_norms_of_what_is_around(name):
    heads, between = AROUND[name]
    assert specs(check(Attention(nn.BatchNorm2d(heads), between).eval(), *qkv())) == PLAIN


NOT_BY_RUNNING_STATISTICS = {
    "training": nn.BatchNorm2d(H).train(),
    "no statistics are kept": nn.BatchNorm2d(H, track_running_stats=False).eval(),
}


@pytest.mark.parametrize("name", NOT_BY_RUNNING_STATISTICS)
def test_statistics_of_the_scores(name):
    model = Attention(NOT_BY_RUNNING_STATISTICS[name], of_heads)
    [region] = check(model, *qkv()).regions
    assert (region.code, region.where.rpartition(": ")[2]) == (
        "opaque-scores",
        "return attend(norm(scores_of(q, k)), v)",
    )
    assert "statistics" in region.hint


def test_statistics_of_the_weights():
    model = Attention(nn.BatchNorm2d(H), AROUND["weights"][1])
    [region] = check(model, *qkv(), training=False).regions
    assert region.code == "opaque-weights" and "model.eval()" in region.hint
