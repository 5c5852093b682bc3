"""Scores, weights and their statistics that the program uses beside the output."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from tests.graph.harness import check, rewrite_only, specs
from tests.graph.inputs import INF, LOWEST, B, H, S, attend, normal, qkv, scores_of, weights_of

PLAIN = "attention(score=0.25*s)"


def graph_of(function, *args) -> list[str]:
    """The names of what the rewritten graph calls."""
    names: list[str] = []

    def keep(gm, inputs):
        rewrite_only(gm, inputs)
        names.extend(
            getattr(n.target, "__name__", str(n.target)) for n in gm.graph.nodes if n.op[0] == "c"
        )
        return gm

    torch._dynamo.reset()
    torch.compile(function, backend=keep)(*args)
    return names


class TestWeightsReturned:
    """They are computed once more where they are needed, and only there."""

    def test_whole(self):
        def attention(q, k, v):
            p = weights_of(q, k)
            return p @ v, p

        [region] = check(attention, *qkv()).regions
        assert region.spec == PLAIN
        assert_expected_inline(
            region.hint,
            """The scores or weights (p) are also used by output and computed once more for it; where that is not needed, do not return them (output_attentions=False).""",
        )

    def test_dead_ones_are_not(self):
        def attention(q, k, v):
            p = weights_of(q, k)
            return p @ v, p

        names = graph_of(lambda q, k, v: attention(q, k, v)[0], *qkv())
        assert "softmax" not in names
        assert graph_of(attention, *qkv()).count("softmax") == 1

    def test_summed(self):
        def attention(q, k, v):
            p = weights_of(q, k)
            return p @ v, -(p * p.log()).sum()

        assert specs(check(attention, *qkv())) == PLAIN

    def test_shape_alone(self):
        def attention(q, k, v):
            p = weights_of(q, k)
            return p @ v, torch.zeros_like(p), p.shape[-1]

        assert specs(check(attention, *qkv())) == PLAIN

    def test_a_part_of_them(self):
        def attention(q, k, v):
            p = weights_of(q, k)
            return p @ v, p[:, 0, -1]

        assert specs(check(attention, *qkv())) == PLAIN

    def test_scores(self):
        def attention(q, k, v):
            s = scores_of(q, k)
            return attend(s, v), s

        assert specs(check(attention, *qkv())) == PLAIN

    def test_written_afterwards(self):
        def attention(q, k, v):
            p = weights_of(q, k)
            y = p @ v
            p.zero_()
            return y, p

        report = check(attention, *(x.detach() for x in qkv()), training=False)
        assert specs(report) == PLAIN

    def test_of_two_values(self):
        def attention(q, k, v):
            p = weights_of(q, k)
            return p @ v, p @ q

        assert specs(check(attention, *qkv())) == f"{PLAIN}\n{PLAIN}"
        assert "softmax" not in graph_of(attention, *qkv())

    def test_scores_of_the_way_there_and_back(self):
        # Soft MoE (Puigcerver et al. 2023): tokens go to slots and come back by the same scores.
        def attention(x, slots, _):
            s = scores_of(x, slots)
            mixed = s.softmax(-2).transpose(-1, -2) @ x
            return attend(s, mixed.tanh())

        plain = PLAIN.replace(")", ", out_order=bqhd)")
        q, k, v = qkv(B, S, 16)
        assert specs(check(attention, q, k[:, :7].detach(), v)) == f"{plain}\n{plain}"
        assert "softmax" not in graph_of(attention, q, k, v)

    def test_scores_that_are_also_values(self):
        def attention(q, k, v):
            s = scores_of(q, k)
            return attend(s, s.tanh())

        assert specs(check(attention, *qkv())) == "check: scores-read"

    def test_scores_there_that_are_not_fused(self):
        def attention(x, slots, _):
            s = scores_of(x, slots)
            return attend(s, s.cumsum(-2).softmax(-2).transpose(-1, -2) @ x)

        assert "check: scores-read" in specs(check(attention, *qkv(B, S, 16)))

    def test_in_the_scores_of_the_next(self):
        # RealFormer: the scores are added to those of the next layer.
        def attention(q, k, v):
            s = scores_of(q, k)
            y = attend(s, v)
            return attend(scores_of(y, k) + s, v)

        report = check(attention, *qkv())
        assert [r.fused for r in report.regions] == [True, True]

    @pytest.mark.parametrize("average", [True, False])
    def test_of_multihead_attention(self, average):
        class Layer(nn.MultiheadAttention):
            def forward(self, x):
                return super().forward(x, x, x, average_attn_weights=average)

        report = check(Layer(32, 2, batch_first=True), normal(B, S, 32))
        assert [r.fused for r in report.regions] == [True]

    def test_of_the_annotated_transformer(self):
        def attention(query, key, value, mask, dropout=None):
            scores = torch.matmul(query, key.transpose(-2, -1)) / query.size(-1) ** 0.5
            scores = scores.masked_fill(mask == 0, -1e9)
            p_attn = scores.softmax(dim=-1)
            if dropout is not None:
                p_attn = dropout(p_attn)
            return torch.matmul(p_attn, value), p_attn

        mask = torch.ones(1, 1, S, S).tril()
        report = check(lambda q, k, v: attention(q, k, v, mask), *qkv())
        assert [r.fused for r in report.regions] == [True]


class TestLogSumExp:
    """Of the same scores: the operator's own."""

    def test_gates_the_output(self):
        def attention(q, k, v, sink):
            s = scores_of(q, k)
            lse = s.logsumexp(-1, keepdim=True)
            return attend(s, v) * torch.sigmoid(lse - sink)

        assert specs(check(attention, *qkv(), normal(H, 1, 1))) == PLAIN
        assert "logsumexp" not in graph_of(attention, *qkv(), normal(H, 1, 1))

    def test_before_the_product(self):
        def attention(q, k, v, sink):
            s = scores_of(q, k)
            gate = torch.sigmoid(s.logsumexp(-1, keepdim=True) - sink)
            return attend(s, v) * gate

        names = graph_of(attention, *qkv(), normal(H, 1, 1))
        assert "logsumexp" not in names and names.count("attention.default") == 1
        check(attention, *qkv(), normal(H, 1, 1))

    def test_before_there_is_a_v(self):
        # Needed for V itself: eager's own.
        def attention(q, k):
            s = scores_of(q, k)
            v = k * s.logsumexp(-1, keepdim=True)
            return attend(s, v)

        report = check(attention, *qkv()[:2])
        assert not any(r.fused for r in report.regions) or specs(report) == PLAIN

    def test_loss_of_its_square(self):
        def attention(q, k, v):
            s = scores_of(q, k).masked_fill(torch.ones(S, S).triu(1).bool(), -INF)
            return attend(s, v), s.logsumexp(-1).square().mean()

        report = check(attention, *qkv())
        assert specs(report) == "attention(score=0.25*s, mask=kv <= q, dead=nan)"
        assert "logsumexp" not in graph_of(attention, *qkv())

    def test_written_twice(self):
        def attention(q, k, v):
            return attend(scores_of(q, k), v), scores_of(q, k).logsumexp(-1)

        assert specs(check(attention, *qkv())) == PLAIN
        assert "logsumexp" not in graph_of(attention, *qkv())

    @pytest.mark.parametrize("again", [False, True])
    def test_taken_off_scores_that_are_kept(self, again):
        # Both have the same roundings, so that weights near 1 are near 1.
        def attention(q, k, v):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                s = (4 * (q @ k.mT)).float()
                lse = s.logsumexp(-1, keepdim=True)
                y = attend(s, v)
                kept = (4 * (q @ k.mT)).float() if again else s
            return y, (kept - lse).exp()

        [region] = check(attention, *qkv()).regions
        assert region.fused
        assert "logsumexp" in graph_of(attention, *qkv())

    def test_sum_of_weights_that_are_kept(self):
        def attention(q, k, v):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                w = (4 * (q @ k.mT)).float().clamp(max=80).exp()
                total = w.sum(-1, keepdim=True).clamp(min=1e-3)
                return (w @ v).float() / total, w / total

        check(attention, *qkv())

    def test_of_other_scores(self):
        def attention(q, k, v):
            return attend(scores_of(q, k), v), (2 * scores_of(q, k)).logsumexp(-1)

        check(attention, *qkv())
        assert "logsumexp" in graph_of(attention, *qkv())

    def test_over_the_queries(self):
        def attention(q, k, v):
            s = scores_of(q, k)
            return attend(s, v), s.logsumexp(-2)

        check(attention, *qkv())
        assert "logsumexp" in graph_of(attention, *qkv())

    def test_rows_of_the_lowest_number(self):
        # A fill that is part of the score is part of its log-sum-exp.
        def attention(q, k, v):
            s = scores_of(q, k).masked_fill(torch.ones(S, S).triu(0).bool(), LOWEST)
            return attend(s, v), s.logsumexp(-1)

        assert_expected_inline(
            specs(check(attention, *qkv())),
            """attention(score=where(kv >= q, -3.4028234663852886e+38, 0.25*s))""",
        )


def test_largest_scores_decide():
    # What is compared with the scores comes from the same scores: their rounding would differ.
    def attention(q, k, v):
        s = scores_of(q, k)
        return attend(s.masked_fill(s < s.topk(5, -1).values[..., -1:], -INF), v)

    [region] = check(attention, *qkv()).regions
    assert (region.code, region.stage) == ("scores-selected", "check")
    assert region.hint and "topk" in region.reason
