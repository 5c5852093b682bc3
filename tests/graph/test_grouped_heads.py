"""Heads that share keys and values, batches that share all of them: read unexpanded."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline

from tests.graph.harness import check, rewrite_only, specs
from tests.graph.inputs import INF, SCALE, B, D, H, S, attend, normal, plain, qkv, scores_of


def test_grouped_heads():
    def expanded(q, k, v):
        k, v = (x[:, :, None].expand(B, 2, 2, S, D).reshape(B, 4, S, D) for x in (k, v))
        return plain(q, k, v)

    def interleaved(q, k, v):
        return plain(q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1))

    def tiled(q, k, v):
        return plain(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))

    def broadcast(q, k, v):
        return plain(q.view(B, 2, 2, S, D), k[:, :, None], v[:, :, None]).view(B, 4, S, D)

    def stacked(q, k, v):
        k, v = (torch.stack([x, x], dim=2).flatten(1, 2) for x in (k, v))
        return plain(q, k, v)

    def indexed(q, k, v):
        heads = torch.arange(4) // 2
        return plain(q, k[:, heads], v[:, heads])

    def rows(q, k, v):
        # The queries of a group one below the other.
        return plain(q.reshape(B, 2, 2 * S, D), k, v).view(B, 4, S, D)

    q, _, _ = qkv()
    k, v = normal(B, 2, S, D, seed=5), normal(B, 2, S, D, seed=6)
    assert_expected_inline(specs(check(expanded, q, k, v)), """attention(score=0.25*s)""")
    assert_expected_inline(specs(check(interleaved, q, k, v)), """attention(score=0.25*s)""")
    assert_expected_inline(specs(check(tiled, q, k, v)), """attention(score=0.25*s)""")
    assert_expected_inline(specs(check(broadcast, q, k, v)), """attention(score=0.25*s)""")
    assert_expected_inline(specs(check(stacked, q, k, v)), """attention(score=0.25*s)""")
    assert_expected_inline(specs(check(indexed, q, k, v)), """attention(score=0.25*s)""")
    assert_expected_inline(specs(check(rows, q, k, v)), """attention(score=0.25*s)""")


def test_grouped_heads_are_not_expanded():
    def attention(q, k, v):
        k, v = (x[:, :, None].expand(B, 2, 2, S, D).reshape(B, 4, S, D) for x in (k, v))
        return plain(q, k, v)

    shapes = []

    def backend(gm, example_inputs):
        rewrite_only(gm, example_inputs)
        [op] = [n for n in gm.graph.nodes if n.target is torch.ops.fa3.attention.default]
        shapes.extend(op.args[1:3])
        return gm

    q, _, _ = qkv()
    torch.compile(attention, backend=backend)(q, normal(B, 2, S, D), normal(B, 2, S, D))
    # K and V are the inputs themselves.
    assert [node.op for node in shapes] == ["placeholder", "placeholder"]


def test_grouped_heads_with_a_bias_for_each_head():
    def attention(q, k, v, bias):
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        return attend(scores_of(q, k) + bias[:, None, None], v)

    q, _, _ = qkv()
    k, v = normal(B, 2, S, D, seed=5), normal(B, 2, S, D, seed=6)
    assert_expected_inline(
        specs(check(attention, q, k, v, normal(H))),
        """attention(score=load(0, h) + 0.25*s, aux=[float])""",
    )


def test_one_key_head():
    q, _, _ = qkv()
    k, v = normal(B, 1, S, D, seed=5), normal(B, 1, S, D, seed=6)
    assert_expected_inline(specs(check(plain, q, k, v)), """attention(score=0.25*s)""")
    assert_expected_inline(specs(check(plain, q, k[:, 0, None], v)), """attention(score=0.25*s)""")
    # One head seen four times, with stride 0.
    assert_expected_inline(
        specs(check(lambda q, k, v: plain(q, k.expand(B, H, S, D), v.expand(B, H, S, D)), q, k, v)),
        """attention(score=0.25*s)""",
    )


def test_inputs_of_stride_zero():
    q, k, _ = (x.detach() for x in qkv())
    k = k[:, :1].expand(B, H, S, D)
    torch.testing.assert_close(torch.compile(plain, backend=rewrite_only)(q, k, k), plain(q, k, k))


def test_keys_of_one_batch_element_for_all():
    q, _, _ = qkv()
    assert_expected_inline(
        specs(check(plain, q, normal(1, H, S, D), normal(1, H, S, D))),
        """attention(score=0.25*s)""",
    )
    assert_expected_inline(
        specs(check(plain, q, normal(H, S, D), normal(H, S, D))), """attention(score=0.25*s)"""
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_table_of_queries_for_all_batches(dynamic):
    """PyTorch makes one matrix product of it, whose rows are the keys of all batches."""

    def matmul(table, k, v, hidden):
        scores = (table @ k.mT).masked_fill(hidden, -INF)
        return scores.softmax(-1) @ v

    def einsum(table, k, v, hidden):
        scores = torch.einsum("bnd,qd->bqn", k.tanh(), table).masked_fill(hidden, -INF)
        return torch.einsum("bqn,bnd->bqd", scores.softmax(-1), v)

    def keys_before_queries(table, k, v, hidden):
        scores = (k @ table.T).masked_fill(hidden.mT, -INF)
        return scores.softmax(1).mT @ v

    table, (k, v) = normal(5, D, seed=7), qkv(B, S, D)[1:]
    hidden = torch.arange(S).view(1, 1, S) >= torch.tensor([S, 9]).view(B, 1, 1)
    for function in (matmul, einsum, keys_before_queries):
        (spec,) = specs(check(function, table, k, v, hidden, dynamic=dynamic)).splitlines()
        assert spec.startswith("attention(score=s, mask=load(0, b, ")


def test_positions_before_heads_that_share_their_keys():
    # The rows of one product run over positions and heads: those compared with keys are queries.
    def attention(q, k, v):
        s = torch.einsum("bshd,btd->bsht", q, k) * SCALE
        hidden = torch.ones(S, S, dtype=torch.bool).triu(1)
        p = s.masked_fill(hidden[:, None], -INF).softmax(-1)
        return torch.einsum("bsht,btd->bshd", p, v)

    q, k, v = normal(B, S, H, D), normal(B, S, D, seed=1), normal(B, S, D, seed=2)
    assert_expected_inline(
        specs(check(attention, q, k, v)),
        """attention(score=0.25*s, mask=kv <= q, dead=nan, out_order=bqhd)""",
    )


def test_conditions_of_a_quotient_beside_rows_of_several_axes():
    """The divisor is read: as 0 it would make the comparison with it one of NaN."""

    def attention(q, k, v, factors, temperature):
        s = torch.einsum("bshd,btd->bsht", q, k) * factors / temperature
        causal = torch.ones(S, S, dtype=torch.bool).tril()
        s = torch.where(causal[:, None], torch.where(s > 0.3, s, 3.0), -INF)
        return torch.einsum("bsht,btd->bshd", s.softmax(-1), v)

    q, k, v = normal(B, S, H, D), normal(B, S, D, seed=1), normal(B, S, D, seed=2)
    report = check(attention, q, k, v, torch.full((S,), 0.25), torch.ones(1))
    assert "mask=kv <= q" in specs(report) and "out_order=bqhd" in specs(report)
