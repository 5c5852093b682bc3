"""Dropout of the weights: which elements are dropped, by which numbers, and what is no such dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn

from fa3_compile.report import collect
from tests.graph.dropout import check_dropout
from tests.graph.harness import check, rewrite_only, specs
from tests.graph.inputs import (
    INF,
    B,
    D,
    H,
    S,
    attend,
    future,
    normal,
    qkv,
    scores_of,
    weights_of,
)


def report_of(function, *args):
    torch._dynamo.reset()
    with collect() as report:
        torch.compile(function, backend=rewrite_only)(*args)
    return report


DROPPED = "weight=where(uniform(load(0, 0), b, h, q, kv) < 0.25, 0, 1.3333333333333333), aux=[int]"


class TestDropout:
    """Its mask is the fused op's own, drawn from a seed; all else is eager's."""

    def test_function(self):
        def made(drop):
            return lambda q, k, v: drop(weights_of(q, k), 0.25) @ v

        assert specs(check_dropout(made, *qkv())) == f"attention(score=0.25*s, {DROPPED})"

    def test_causal_in_merged_heads(self):
        def made(drop):
            def attention(x):
                q, k, v = x.view(B, S, 3, H, D).permute(2, 0, 3, 1, 4)
                p = scores_of(q, k).masked_fill(future(), -INF).softmax(-1)
                return (drop(p, 0.25) @ v).transpose(1, 2).reshape(B, S, H * D)

            return attention

        assert_expected_inline(
            specs(check_dropout(made, normal(B, S, 3 * H * D))),
            """attention(score=0.25*s, mask=kv <= q, dead=nan, weight=where(uniform(load(0, 0), b, h, q, kv) < 0.25, 0, 1.3333333333333333), aux=[int], out_order=bqhd)""",
        )

    def test_grouped_heads(self):
        def made(drop):
            def attention(q, k, v):
                k, v = (x.repeat_interleave(2, 1) for x in (k, v))
                return drop(weights_of(q, k), 0.25) @ v

            return attention

        q = normal(B, H, S, D)
        k, v = (normal(B, H // 2, S, D, seed=i) for i in (4, 5))
        assert specs(check_dropout(made, q, k, v)) == f"attention(score=0.25*s, {DROPPED})"

    def test_cast_in_between(self):
        def made(drop):
            def attention(q, k, v):
                p = F.softmax(scores_of(q, k), -1, dtype=torch.float32).to(q.dtype)
                return drop(p, 0.25) @ v

            return attention

        assert specs(check_dropout(made, *qkv())) == f"attention(score=0.25*s, {DROPPED})"

    def test_module_in_training(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.drop = nn.Dropout(0.25)

            def forward(self, q, k, v):
                return self.drop(weights_of(q, k)) @ v

        report = report_of(Model(), *qkv())
        assert specs(report) == f"attention(score=0.25*s, {DROPPED})"
        assert specs(report_of(Model().eval(), *qkv())) == "attention(score=0.25*s)"

    def test_in_place(self):
        def made(drop):
            def attention(q, k, v):
                p = weights_of(q, k)
                if drop is F.dropout:
                    F.dropout(p, 0.25, True, True)
                else:
                    p = drop(p, 0.25)
                return p @ v

            return attention

        assert specs(check_dropout(made, *qkv())) == f"attention(score=0.25*s, {DROPPED})"

    def test_of_sdpa(self):
        def made(drop):
            if drop is F.dropout:
                return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.25)
            return lambda q, k, v: drop(weights_of(q, k), 0.25) @ v

        report = check_dropout(made, *qkv())
        assert specs(report) == f"attention(score=0.25*s, {DROPPED})"

    def test_of_multihead_attention(self):
        layer = nn.MultiheadAttention(32, 2, dropout=0.25, batch_first=True)
        x = normal(B, S, 32)

        def attention(x, need_weights):
            return layer(x, x, x, need_weights=need_weights)[0]

        for need_weights in (False, True):
            assert "uniform" in specs(report_of(attention, x, need_weights))

    def test_everything_dropped(self):
        report = check(lambda q, k, v: F.dropout(weights_of(q, k), 1.0) @ v, *qkv())
        assert [r.fused for r in report.regions] in ([], [False])

    def test_two_of_one_program_differ(self):
        def attention(q, k, v):
            eye = torch.eye(S).expand(B, H, S, S)
            first = F.dropout(weights_of(q, k), 0.5) @ eye
            return first, F.dropout(weights_of(q, k), 0.5) @ eye

        torch._dynamo.reset()
        first, second = torch.compile(attention, backend=rewrite_only)(*qkv())
        assert ((first == 0) != (second == 0)).float().mean() > 0.4

    def test_statistics_and_seed(self):
        def attention(q, k):
            eye = torch.eye(64).expand(2, 8, 64, 64)
            return F.dropout((q @ k.mT).softmax(-1), 0.1) @ eye

        q, k = (normal(2, 8, 64, D, seed=i).detach() for i in (1, 2))
        weights = (q @ k.mT).softmax(-1)
        compiled = torch.compile(attention, backend=rewrite_only)

        def run(seed):
            torch.manual_seed(seed)
            return compiled(q, k), compiled(q, k)

        (a, b), (again, _) = run(1), run(1)
        assert torch.equal(a, again) and not torch.equal(a, b)
        kept = a != 0
        torch.testing.assert_close(a[kept], weights[kept] / 0.9)
        # 65,536 draws: five standard deviations are 0.006.
        assert abs(kept.double().mean() - 0.9) < 0.006
        for axis in (0, 1, 2, 3):
            rest = [d for d in range(4) if d != axis]
            spread = kept.double().mean(rest)
            draws = kept.numel() // kept.shape[axis]
            assert (spread - 0.9).abs().max() < 5 * (0.09 / draws) ** 0.5, axis

    def test_random_numbers_afterwards_are_still_drawn(self):
        def attention(q, k, v):
            y = F.dropout(weights_of(q, k), 0.5) @ v
            return y + torch.rand(S, D), torch.rand(3)

        torch._dynamo.reset()
        compiled = torch.compile(attention, backend=rewrite_only)
        torch.manual_seed(0)
        first = compiled(*qkv())
        torch.manual_seed(0)
        assert all(map(torch.equal, first, compiled(*qkv())))


class TestNearDropout:
    """Random numbers that are no dropout of the weights, or not of them alone."""

    def declined(self, function, *args):
        report = report_of(function, *(args or qkv()))
        assert not any(r.fused for r in report.regions), str(report)
        assert all(r.hint and r.node for r in report.regions), str(report)
        return specs(report)

    def test_of_the_scores(self):
        assert_expected_inline(
            self.declined(lambda q, k, v: attend(F.dropout(scores_of(q, k), 0.5), v)),
            """detect: dropout-of-scores""",
        )

    def test_of_whole_heads(self):
        assert_expected_inline(
            self.declined(lambda q, k, v: F.dropout2d(weights_of(q, k), 0.5) @ v),
            """lift: random-numbers""",
        )

    def test_alpha(self):
        self.declined(lambda q, k, v: F.alpha_dropout(weights_of(q, k), 0.5, True) @ v)

    def test_shared_by_all_heads(self):
        def attention(q, k, v):
            return F.dropout(weights_of(q[:, :1], k[:, :1]), 0.5) @ v

        assert_expected_inline(self.declined(attention), """detect: dropout-shared""")

    def test_returned_too(self):
        def attention(q, k, v):
            p = F.dropout(weights_of(q, k), 0.5)
            return p @ v, p

        assert_expected_inline(self.declined(attention), """check: dropped-weights-used""")

    def test_of_two_values(self):
        def attention(q, k, v):
            p = F.dropout(weights_of(q, k), 0.5)
            return p @ v, p @ q

        assert_expected_inline(self.declined(attention), """check: dropped-weights-used""")

    def test_returned_before_it_is_dropped(self):
        def made(drop):
            def attention(q, k, v):
                p = weights_of(q, k)
                return drop(p, 0.25) @ v + p.sum(-1, keepdim=True)

            return attention

        assert specs(check_dropout(made, *qkv())) == f"attention(score=0.25*s, {DROPPED})"

    def test_of_the_values(self):
        report = report_of(lambda q, k, v: weights_of(q, k) @ F.dropout(v, 0.5), *qkv())
        assert specs(report) == "attention(score=0.25*s)"

    def test_of_the_output(self):
        report = report_of(lambda q, k, v: F.dropout(weights_of(q, k) @ v, 0.5), *qkv())
        assert specs(report) == "attention(score=0.25*s)"

    def test_mask_drawn_apart(self):
        # Its numbers are read, so that they are eager's own.
        def attention(q, k, v):
            keep = torch.rand(B, H, S, S) < 0.9
            return weights_of(q, k) * keep / 0.9 @ v

        torch.manual_seed(0)
        expected = attention(*qkv())
        torch.manual_seed(0)
        torch.testing.assert_close(torch.compile(attention, backend=rewrite_only)(*qkv()), expected)
        assert [r.fused for r in report_of(attention, *qkv()).regions] == [True]
