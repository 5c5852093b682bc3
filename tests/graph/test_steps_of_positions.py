"""Roundings and comparisons of positions: exact in closed form, or read from the program."""

from __future__ import annotations

import pytest
import torch

from tests.graph.harness import check, specs
from tests.graph.inputs import INF, H, S, attend, normal, qkv, queries_and_keys, scores_of


def masked(seen) -> str:
    """The mask of a program whose keys are seen where `seen(q, kv)` of integers says so."""

    def attention(q, k, v):
        scores = scores_of(q, k)
        return attend(scores.masked_fill(~seen(*queries_and_keys()), -INF), v)

    report = check(attention, *(x.detach() for x in qkv()))
    return specs(report).removeprefix("attention(score=0.25*s, mask=").removesuffix(", dead=nan)")


CLOSED = {
    # 41 times 1/41 is not 1 in float32.
    "floor": (
        lambda q, kv: (kv * 8 / 41).floor() == (q * 8 / 41).floor(),
        "floordiv(8*kv, 41) == floordiv(8*q, 41)",
    ),
    "cast": (
        lambda q, kv: (kv * 8 / 41).int() == (q * 8 / 41).long(),
        "floordiv(8*kv, 41) == floordiv(8*q, 41)",
    ),
    "ceil": (
        lambda q, kv: (kv / 6).ceil() == (q / 6).ceil(),
        "-floordiv(-kv, 6) == -floordiv(-q, 6)",
    ),
    "round": (
        lambda q, kv: (kv / 7).round() == (q / 7).round(),
        "floordiv(2*kv + 7, 14) == floordiv(2*q + 7, 14)",
    ),
    "halves": (
        lambda q, kv: (kv * 0.5).floor() == (q * 0.5).floor(),
        "floordiv(kv, 2) == floordiv(q, 2)",
    ),
    "division that rounds": (
        lambda q, kv: torch.div(kv * 1.0, 5, rounding_mode="floor") == (q * 1.0 / 5).trunc(),
        "floordiv(kv, 5) == floordiv(q, 5)",
    ),
    "comparison of quotients": (lambda q, kv: kv / 10 >= q / 4, "4*kv >= 10*q"),
    "shift": (lambda q, kv: kv >> 2 == q << 1, "floordiv(kv, 4) == 2*q"),
    "towards zero": (
        lambda q, kv: torch.div(kv - q, 5, rounding_mode="trunc") == 0,
        "((floordiv(kv - q, 5) == 0) & (kv >= q)) | ((floordiv(q - kv, 5) == 0) & (kv <= q - 1))",
    ),
}


@pytest.mark.parametrize(("seen", "mask"), CLOSED.values(), ids=CLOSED)
def test_closed_form(seen, mask):
    assert masked(seen) == mask


READ = {
    "tenths": lambda q, kv: ((kv - q) * 0.1).abs() <= 0.3,
    "tenths beside a number": lambda q, kv: (kv / 10 >= 0.7) | (q == kv),
    "halves of sixths": lambda q, kv: (kv / 6).round() == (q / 6).round(),
    "logarithm": lambda q, kv: (kv + 1.0).log2().floor() == (q + 1.0).log2().floor(),
}


@pytest.mark.parametrize("seen", READ.values(), ids=READ)
def test_read(seen):
    assert "load(" in masked(seen)


@pytest.mark.parametrize("mode", ["trunc", "floor"])
def test_quotients_and_remainders_of_negative_numbers(mode):
    def attention(q, k, v):
        at, keys = queries_and_keys()
        quotients = torch.div(keys - at, 5, rounding_mode=mode)
        remainders = (torch.fmod if mode == "trunc" else torch.remainder)(keys - at, 4)
        return attend(scores_of(q, k) + quotients - remainders, v)

    assert len(check(attention, *qkv()).fused) == 1


@pytest.mark.parametrize("step", [torch.trunc, torch.round, torch.floor])
def test_a_step_of_an_infinite_number(step):
    assert masked(lambda q, kv: step((kv * 0.0).log()).clamp(min=-3) < q - kv) == "kv <= q + 2"


def test_an_infinite_number_as_an_integer():
    """T5's buckets of one position: the logarithm of distance 0 is computed and not used."""

    def attention(q, k, v, table):
        distance = -torch.min(torch.arange(S) - torch.zeros(1, 1), torch.zeros(1, S)).long()
        far = (4 + (distance.float() / 4).log() * 2).long()
        far = torch.min(far, torch.full_like(far, 7))
        bias = table[torch.where(distance < 4, distance, far)].permute(2, 0, 1)
        return attend(scores_of(q, k) + bias, v)

    q, k, v = qkv()
    assert len(check(attention, q[:, :, :1], k, v, normal(8, H)).fused) == 1
