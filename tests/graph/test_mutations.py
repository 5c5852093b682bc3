"""Writes in between, however they are spelled: what the program reads is what it reads in eager."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.graph.harness import check, specs
from tests.graph.inputs import B, D, H, S, attend, qkv, scores_of, uniform


@torch.library.custom_op("fa3_test::double", mutates_args={"x"})
def double(x: torch.Tensor) -> None:
    x.mul_(2)


@double.register_fake
def _(x):
    return None


ONE = torch.ones(1, requires_grad=True)


class Doubled(torch.autograd.Function):
    """Writes to its second input, and says nothing of it."""

    @staticmethod
    def forward(ctx, w, x):
        x.mul_(2)
        return w.clone()

    @staticmethod
    def backward(ctx, g):
        return g, None


def in_an_autograd_function(x):
    Doubled.apply(ONE, x)


def in_a_checkpoint(x):
    checkpoint(lambda x: x.mul_(2).sum(), x, use_reentrant=False)


WRITES = {
    "in place by position": lambda x: F.leaky_relu(x, 0.1, True),
    "out by position": lambda x: F.normalize(x, 2.0, -1, 1e-12, x),
    "in-place operator as a method": lambda x: x.__ipow__(2),
    "list of tensors": lambda x: torch.ops.aten._foreach_mul_([x], 2.0),
    "aten": lambda x: torch.ops.aten.mul_(x, 2),
    "aten overload": lambda x: torch.ops.aten.mul_.Scalar(x, 2),
    "custom operator": double,
    "custom operator by name": lambda x: torch.ops.fa3_test.double(x.mT[0]),
    "checkpoint": in_a_checkpoint,
    "autograd function": in_an_autograd_function,
}


def given():
    return tuple(x.detach() for x in qkv())


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
class TestWritten:
    def test_keys_after_they_were_read(self, write):
        def attention(q, k, v):
            k = k.tanh()
            s = scores_of(q, k)
            write(k)
            return attend(s, v), k

        assert not check(attention, *given()).fused

    def test_values_and_a_bias_before_they_are_read(self, write):
        def attention(q, k, v):
            v, bias = v.tanh(), torch.ones(S).cumsum(0)
            s = scores_of(q, k) + bias
            write(v)
            write(bias.view(2, -1))
            return attend(s + bias, v)

        assert len(check(attention, *given()).fused) == 1

    def test_scores(self, write):
        def attention(q, k, v):
            s = scores_of(q, k)
            write(s)
            return attend(s, v)

        check(attention, *given())


def test_operators_by_their_aten_name():
    aten = torch.ops.aten

    def attention(q, k, v):
        q = aten.mul.Scalar(q, 0.5)
        k = aten.mul(aten.transpose(k, -2, -1), 0.5)
        return aten.matmul(aten._safe_softmax(aten.matmul(q, k), -1), v)

    assert specs(check(attention, *qkv())) == "attention(score=0.25*s)"


@pytest.mark.parametrize("overload", [False, True])
def test_sdpa_by_its_aten_name(overload):
    sdpa = torch.ops.aten.scaled_dot_product_attention

    def attention(q, k, v):
        return (sdpa.default if overload else sdpa)(q, k, v, None, 0.0, True)

    assert specs(check(attention, *qkv())) == "attention(score=0.25*s, mask=kv <= q, dead=nan)"


def test_transposed_output_is_written_in_place():
    def attention(q, k, v):
        y = attend(scores_of(q, k), v).transpose(1, 2)
        y.mul_(2)
        return y

    assert specs(check(attention, *qkv())) == "attention(score=0.25*s)"


def test_memory_of_one_element_written_by_what_is_not_looked_into():
    def attention(q, k, v):
        v = (v[:, :, :1] * 1).expand(B, H, S, D)
        p = scores_of(q, k).softmax(-1)
        double(v[:, :, :1])
        return p @ v

    check(attention, *given())


def test_bias_scaled_in_place_before():
    # What the load would read is no more in memory: the scaled tensor is read instead.
    def attention(q, k, v, x):
        bias = x.sin()
        bias *= 3
        return attend(scores_of(q, k) + bias, v)

    report = check(attention, *qkv(), uniform(S, S))
    assert specs(report) == "attention(score=load(0, q, kv) + 0.25*s, aux=[float])"


def _into_zeros(s, p):
    w = torch.zeros_like(s)
    w[..., :5].copy_(p[..., :5])
    return w


# What follows reads the memory that was written, and not what the softmax returned.
SOFTMAXES_WRITTEN = {
    "copied over the scores": lambda s: (s.copy_(s.softmax(-1)), s)[1],
    "out": lambda s: (torch.softmax(s, dim=-1, out=s), s)[1],
    "copied over a view": lambda s: (s.view(-1, S).copy_(s.softmax(-1).view(-1, S)), s)[1],
    "copied in part": lambda s: _into_zeros(s, s.softmax(-1)),
}


@pytest.mark.parametrize("name", SOFTMAXES_WRITTEN)
def test_softmax_that_is_written(name):
    def attention(q, k, v):
        return SOFTMAXES_WRITTEN[name](q @ k.mT) @ v

    [region] = check(attention, *(x.detach() for x in qkv()), training=False).regions
    assert region.fused


def test_product_with_values_that_is_written():
    def attention(q, k, v):
        out = torch.empty_like(v)
        torch.matmul(scores_of(q, k).softmax(-1), v, out=out)
        return out

    [region] = check(attention, *(x.detach() for x in qkv()), training=False).regions
    assert region.code == "output-unclear" and "out=" in region.reason


@pytest.mark.parametrize("products", ["bqhd,bkhd->bqhk", "bqhd,bkhd->qbhk", "bqhd,bkhd->bhqk"])
def test_fills_in_place_of_products_in_any_layout(products):
    """Such a product is a view of what bmm gives, to which a fill is written back."""

    def attention(q, k, v, hidden):
        scores = torch.einsum(products, q, k)
        at = ["bqhk".index(axis) for axis in products[-4:]]
        scores.masked_fill_(hidden.view(B, S, 1, 1).permute(at), -torch.inf)
        scores.masked_fill_(hidden.view(B, 1, 1, S).permute(at), -1e9)
        return torch.einsum(f"{products[-4:]},bkhd->bqhd", scores.softmax(-1), v)

    hidden = torch.arange(S) >= torch.tensor([S, S - 3]).view(B, 1)
    report = check(attention, *qkv(B, S, H, D), hidden, training=False)
    assert len(report.fused) == len(report.regions) == 1
