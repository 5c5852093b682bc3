"""Copies that convert, constants of other types, and what is held constant for the gradient."""

from __future__ import annotations

import pytest
import torch

from tests.graph.harness import check, specs
from tests.graph.inputs import D, S, attend, chance, normal, qkv, scores_of

FUSED = "attention(score="


def added(make, *args):
    """What becomes of scores to which `make` adds something."""
    return specs(check(lambda q, k, v, *more: attend(scores_of(q, k) + make(*more), v), *args))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float16], ids=str)
def test_a_copy_has_the_type_of_what_it_is_written_to(dtype):
    def copied(table):
        held = torch.zeros(S, S, dtype=dtype)
        held.copy_(table)
        held[:, 1:] = table[:, 1:] * 2
        return held.float()

    assert added(copied, *qkv(), 3 * normal(S, S).detach()).startswith(FUSED)


@pytest.mark.parametrize(
    "make",
    [
        lambda kv: torch.full((S,), 2.7, dtype=torch.int64),
        lambda kv: torch.full_like(kv, 1.6),
        lambda kv: torch.zeros_like(kv).fill_(-1.7),
        lambda kv: torch.full((S,), 0.1, dtype=torch.float16).float(),
        lambda kv: torch.full((S,), 2.7).long(),
    ],
)
def test_a_constant_is_of_its_type(make):
    def bias():
        kv = torch.arange(S)
        return make(kv) * kv

    assert added(bias, *qkv()).startswith(FUSED)


def test_a_division_by_zero_is_read_from_the_program():
    report = check(lambda q, k, v: attend(scores_of(q, k) / (k.shape[-1] - D), v), *qkv())
    assert specs(report) == "lift: not-pointwise"


@pytest.mark.parametrize(
    "changed",
    [
        lambda s, q, k: s * k.abs().amax(-1).detach()[:, :, None, :],
        lambda s, q, k: s / k.abs().max(-1).values.detach()[:, :, None, :],
        lambda s, q, k: s - q.amax(-1, keepdim=True).detach() * k.amax().detach(),
    ],
)
def test_a_detached_maximum_of_keys_or_queries_has_no_gradient(changed):
    report = check(lambda q, k, v: attend(changed(scores_of(q, k), q, k), v), *qkv())
    assert specs(report).startswith(FUSED)


@pytest.mark.parametrize(
    "statistic",
    [
        lambda s: s.amax(-1, keepdim=True).detach(),
        lambda s: s.amax(-1).unsqueeze(-1).detach(),
        lambda s: s.logsumexp(-1).detach().unsqueeze(-1),
        lambda s: s.detach().max(),
    ],
)
def test_a_detached_statistic_of_the_row_cancels(statistic):
    def attention(q, k, v, mask):
        s = scores_of(q, k).masked_fill(mask, -torch.inf)
        e = (s - statistic(s)).exp()
        return e / e.sum(-1, keepdim=True) @ v

    mask = chance(0.3, S, S) & ~torch.eye(S, dtype=torch.bool)
    assert specs(check(attention, *qkv(), mask)).startswith(FUSED)


def test_weights_less_a_constant_logsumexp_are_no_softmax():
    def attention(q, k, v):
        s = scores_of(q, k)
        return (s - s.logsumexp(-1, keepdim=True).detach()).exp() @ v

    assert specs(check(attention, *qkv())) == "detect: row-statistic"
