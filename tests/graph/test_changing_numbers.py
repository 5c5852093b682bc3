"""Python numbers that change from call to call, or that are computed from a length: scales, windows,
sizes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn

from tests.graph.harness import check, runs, specs
from tests.graph.inputs import (
    INF,
    LOWEST,
    B,
    D,
    H,
    S,
    attend,
    normal,
    of_lengths,
    qkv,
    scores_of,
)


def test_scale_of_a_changing_number():
    def attention(q, k, v, scale):
        return attend(q @ k.mT * scale, v)

    inputs = [(*x, c) for x, c in zip(of_lengths(24, 24, 24), (0.25, 0.5, 1.75), strict=True)]
    compiled = runs(attention, inputs, dynamic=None)
    assert "fused" not in compiled and "attention" in compiled


def test_window_of_a_changing_number():
    def attention(q, k, v, window):
        at = torch.arange(q.size(-2))
        d = at[:, None] - at[None]
        return attend(scores_of(q, k).masked_fill((d < 0) | (d >= window), -INF), v)

    inputs = [(*x, n) for x, n in zip(of_lengths(24, 24, 24, 24), (3, 5, 9, 11), strict=True)]
    assert_expected_inline(
        runs(attention, inputs, dynamic=None),
        """\
attention(score=0.25*s, mask=(kv <= q) & (kv >= q - 2), dead=nan)
attention(score=0.25*s, mask=(kv <= q) & (kv >= n1 + q - n0 + 1), dead=nan)""",
    )


def test_offset_of_a_changing_number_that_may_be_negative():
    def attention(q, k, v, offset):
        return attend(scores_of(q, k).masked_fill(torch.arange(S) + offset < 0, -INF), v)

    inputs = [(*qkv(), n) for n in (3, -2, 5, -7)]
    assert_expected_inline(
        runs(attention, inputs, dynamic=None),
        """\
attention(score=0.25*s)
attention(score=0.25*s, mask=kv >= n1 - n0, dead=nan)""",
    )


def test_scale_that_depends_on_the_length():
    def attention(q, k, v):
        return attend(q @ k.mT / k.size(-2) ** 0.5, v)

    assert_expected_inline(
        runs(attention, of_lengths(24, 7, 40)), """attention(score=pow(Skv, -0.5)*s)"""
    )


def test_chunks_of_a_dynamic_length():
    def attention(q, k, v):
        at = torch.arange(q.size(-2)) // 8
        return attend(scores_of(q, k).masked_fill(at[None] != at[:, None], -INF), v)

    assert_expected_inline(
        runs(attention, of_lengths(24, 7, 40)),
        """attention(score=load(0)*s, mask=floordiv(kv, 8) == floordiv(q, 8), dead=nan, aux=[float])""",
    )


def test_factor_of_a_product_that_changes():
    def attention(q, k, v, alpha):
        s = torch.baddbmm(torch.zeros(1), q, k.mT, beta=0, alpha=alpha)
        return attend(s, v)

    inputs = [(*qkv(B, n, D), alpha) for n, alpha in ((9, 0.3), (12, 0.7))]
    spec = "attention(score=load(0)*s, aux=[float], out_order=bqhd)"
    assert runs(attention, inputs) == spec


def merged(softmax):
    """Attention whose head dimension has to be equal to an int of the program, flattened."""

    # Which of two equal symbols stays is decided by their names, which the argument's is hashed to:
    # that of `width` stays, and has no sign.
    def attention(q, k, v, heads, width):
        k, v = (x[:, :, None].expand(-1, -1, 2, -1, width).flatten(1, 2) for x in (k, v))
        out = softmax(scores_of(q, k)) @ v
        return out.transpose(1, 2).reshape(q.size(0), -1, heads * width).flatten()

    return attention


def with_two_kv_heads(*lengths):
    inputs = of_lengths(*lengths, batch=3)
    return [(q, *(x[:, :2].detach().requires_grad_() for x in kv), H, D) for q, *kv in inputs]


def test_head_dim_that_is_an_int_of_the_program():
    assert_expected_inline(
        runs(merged(lambda s: s.softmax(-1)), with_two_kv_heads(24, 7)),
        """attention(score=load(0)*s, aux=[float], out_order=bqhd)""",
    )


def test_head_dim_that_is_an_int_of_the_program_near_miss():
    for softmax in (lambda s: s.softmax(-2), lambda s: s.softmax(-1).mT):
        found = specs(check(merged(softmax), *with_two_kv_heads(24)[0], dynamic=True))
        assert found == "detect: softmax-axis"


def test_channels_divided_by_heads():
    def attention(q, k, v, heads):
        (b, n, c), h = q.shape, len(heads)
        q, k, v = (x.reshape(b, n, h, c // h).transpose(1, 2) for x in (q, k, v))
        return attend(scores_of(q, k), v).transpose(1, 2).reshape(b, n, c)

    [region] = check(attention, *qkv(B, S, 4 * D), torch.ones(H), dynamic=True).regions
    assert "dynamic size" in region.reason
    # That a number of heads divides the channels is known, however many there are.
    for dynamic in (True, False):
        assert check(attention, *qkv(B, S, 4 * D), [None] * H, dynamic=dynamic).fused


def test_lengths_that_are_computed():
    # One split by numbers that are read from a tensor, which is no input of the graph.
    def attention(q, k, v, lengths):
        parts = (x.split(lengths.tolist(), 2) for x in (q, k, v))
        return torch.cat([attend(scores_of(q, k), v) for q, k, v in zip(*parts)], 2)

    inputs = [(*qkv(), torch.tensor([n, S - n])) for n in (8, 13)]
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        assert_expected_inline(
            runs(attention, inputs, dynamic=None),
            """\
attention(score=0.25*s, out_order=qbhd)
attention(score=0.25*s, out_order=qbhd)""",
        )


def test_a_share_of_the_length():
    # An integer made by rounding has no formula in specs: it is a size of its own.
    def attention(q, k, v):
        kept, near = int(0.5 * k.size(2)), round(0.3 * k.size(2))
        i = torch.arange(k.size(2))
        band = (i[: q.size(2), None] - i[:kept]).abs() <= near
        return attend(scores_of(q, k[:, :, :kept]).masked_fill(~band, -INF), v[:, :, :kept])

    assert_expected_inline(
        runs(attention, of_lengths(24, 17, 40)),
        """attention(score=load(0)*s, mask=(kv <= n0 + q) & (kv >= q - n0), dead=nan, aux=[float])""",
    )


class LastKeys(nn.Module):
    share = 0.3

    def forward(self, q, k, v):
        kept = int(self.share * k.size(2))
        return attend(scores_of(q, k[:, :, -kept:]), v[:, :, -kept:])


def test_a_float_of_the_model_in_a_size():
    assert_expected_inline(
        runs(LastKeys(), of_lengths(24, 17)), """attention(score=load(0)*s, aux=[float])"""
    )


def test_padding_by_a_length():
    # Transformer-XL's shift.
    def attention(q, k, v, places):
        n = q.size(2)
        bias = F.pad(q @ places[: 2 * n - 1].mT, (0, 1)).flatten(2)
        bias = F.pad(bias, (0, n - 1)).view(*q.shape[:2], n + 1, -1)[:, :, :n, n - 1 :]
        return attend(scores_of(q, k) + bias, v)

    inputs = [(*x, normal(99, D, seed=9)) for x in of_lengths(9, 12)]
    assert_expected_inline(
        runs(attention, inputs),
        """attention(score=load(0)*s + load(1, b, h, q, Skv + kv - q - 1), aux=[float, float])""",
    )


def test_the_smaller_of_two_lengths():
    def attention(q, k, v):
        n = min(q.size(2), k.size(2) // 2)
        q, k, v = (x[:, :, : 2 * n].reshape(*x.shape[:2], 2, n, -1) for x in (q, k, v))
        return attend(scores_of(q, k), v)

    assert runs(attention, of_lengths(30, 21)).startswith("attention(score=load(0)*s")


def test_a_size_that_cannot_be_written():
    def attention(q, k, v, on):
        return attend(scores_of(q, k) * bool(on), v)

    assert runs(attention, [(*qkv(), 0.5)]) == "rewrite: size-unclear"


FLOATS = {"scale": 0.3, "fill": -1e4}


def test_floats_of_a_dynamic_program():
    # Dynamo makes them symbols, which no spec has a word for: they are read as tensors.
    def attention(q, k, v):
        seen = torch.ones(S, S).tril().bool()
        scores = (q @ k.mT * FLOATS["scale"]).masked_fill(~seen, FLOATS["fill"])
        return attend(scores + torch.where(seen, 0.0, max(FLOATS["fill"], LOWEST)), v)

    assert len(check(attention, *qkv(), dynamic=True).fused) == 1


@pytest.mark.parametrize("log", [math.log, math.log2])
def test_logarithms_of_numbers_and_lengths(log):
    def attention(q, k, v, base):
        return attend(scores_of(q, k) * log(base) * log(k.size(-2)), v)

    inputs = [(*x, c) for x, c in zip(of_lengths(24, 16, 40), (2.5, 7.0, 1.75), strict=True)]
    assert runs(attention, inputs, dynamic=True).startswith("attention(score=")
