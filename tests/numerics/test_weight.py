"""A factor after the softmax: the reference against torch written out by hand."""

from __future__ import annotations

import pytest
import torch

import fa3_compile.runtime.op  # noqa: F401  defines the operator
from fa3_compile.lower.kernels.reference import attention, attention_backward
from fa3_compile.lower.printers.philox import uniform
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.expr import load
from fa3_compile.spec.forms import dropout_weight

CAUSAL = "mask=kv <= q, dead=nan"
SHAPE = (2, 4, 2, 9, 13, 8)  # B, H, Hkv, Sq, Skv, D


def inputs():
    torch.manual_seed(0)
    b, h, kv_heads, q_len, kv_len, d = SHAPE
    q = torch.randn(b, h, q_len, d, dtype=torch.float64, requires_grad=True)
    k = torch.randn(b, kv_heads, kv_len, d, dtype=torch.float64, requires_grad=True)
    v = torch.randn(b, kv_heads, kv_len, d, dtype=torch.float64, requires_grad=True)
    return q, k, v


def by_hand(q, k, v, factor):
    """Causal attention with each weight multiplied by `factor` after the softmax."""
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = (0.3 * q @ k.mT).masked_fill(torch.ones(9, 13).triu(1).bool(), float("-inf"))
    return (scores.softmax(-1) * factor) @ v, scores.logsumexp(-1)


def of_everything(seed):
    """`uniform` of every element."""
    axes = [torch.arange(n) for n in (2, 4, 9, 13)]
    b, h, q, kv = (x.view([-1 if i == j else 1 for i in range(4)]) for j, x in enumerate(axes))
    return uniform(seed, b, h, q, kv)


def check(spec, aux, factor, needs):
    q, k, v = inputs()
    wanted = [x for x, n in zip((q, k, v, *aux), needs) if n]
    out, lse = by_hand(q, k, v, factor)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    expected = torch.autograd.grad((out, lse), wanted, (dout, dlse))
    found, found_lse = attention(spec, q, k, v, aux, [])
    torch.testing.assert_close(found, out)
    torch.testing.assert_close(found_lse, lse)
    dq, dk, dv, daux = attention_backward(spec, dout, dlse, q, k, v, aux, [], needs)
    grads = [x for x, n in zip((dq, dk, dv, *daux), needs) if n]
    for x, y in zip(grads, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("p", [0.2, 0.999])
def test_dropout(p):
    seed = torch.tensor([2**40 + 5])
    weight = dropout_weight(load(0, 0), p)
    spec = AttentionSpec.parse(f"attention(score=0.3*s, {CAUSAL}, weight=1, aux=[int])")
    spec = AttentionSpec(spec.score, spec.mask, weight=weight, aux=("int",))
    kept = of_everything(seed).double() >= p
    check(spec, [seed], kept / (1 - p), [True, True, True, False])


def test_factors_with_a_gradient():
    spec = AttentionSpec.parse(
        f"attention(score=0.3*s, {CAUSAL}, weight=load(0, h)*load(1, q, kv) + 0.5,"
        " aux=[float, float])"
    )
    gate = torch.randn(4, dtype=torch.float64, requires_grad=True)
    table = torch.randn(9, 13, dtype=torch.float64, requires_grad=True)
    check(spec, [gate, table], gate.view(4, 1, 1) * table + 0.5, [True] * 5)


def test_another_seed_is_another_mask_and_the_operator_takes_it():
    weight = dropout_weight(load(0, 0), 0.5)
    spec = AttentionSpec(weight=weight, aux=("int",))
    q, k, v = (x.float().detach() for x in inputs())

    def run(seed):
        text = f"{spec} #;kernels=reference"
        return torch.ops.fa3.attention(q, k, v, [torch.tensor([seed])], [], text)[0]

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


def test_no_dropout_is_exactly_the_same_text():
    assert str(AttentionSpec(weight=dropout_weight(load(0, 0), 0.0), aux=("int",))) == (
        "attention(score=s, aux=[int])"
    )
