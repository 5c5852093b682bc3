"""no_grad, inference_mode and detach around an attention and inside it."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline

from tests.graph.harness import assert_same, check, specs
from tests.graph.inputs import (
    INF,
    PLAIN,
    B,
    H,
    S,
    attend,
    normal,
    plain,
    qkv,
    scores_of,
    uniform,
)


def in_inference_mode(q, k, v):
    with torch.inference_mode():
        return attend(q @ k.mT, v)


class TestGradientModes:
    def test_no_grad_inside(self):
        def attention(q, k, v):
            with torch.no_grad():
                y = plain(q, k, v)
            return y * v

        assert specs(check(attention, *qkv())) == PLAIN

    def test_no_grad_around_the_mask(self):
        def attention(q, k, v):
            with torch.no_grad():
                mask = torch.full((S, S), -INF).triu(1)
            return attend(scores_of(q, k) + mask, v)

        report = check(attention, *qkv())
        assert specs(report) == "attention(score=0.25*s, mask=kv <= q, dead=nan)"

    def test_fill_made_like_the_scores(self):
        def attention(q, k, v, keep):
            s = scores_of(q, k)
            return attend(torch.where(keep, s, -9e15 * torch.ones_like(s)), v)

        assert_expected_inline(
            specs(check(attention, *qkv(), uniform(S, S) < 0.5)),
            """attention(score=where(load(0, q, kv) != 0, 0.25*s, -9000000000000000.0), aux=[bool])""",
        )

    @pytest.mark.parametrize("like", ["to", "type_as", "expand_as", "reshape_as", "view_as"])
    def test_bias_made_like_the_scores(self, like):
        # The scores are asked for their shape or type alone: nobody computes them once more.
        def attention(q, k, v, bias):
            s = scores_of(q, k)
            return attend(s + getattr(bias.cumsum(-1), like)(s), v)

        report = check(attention, *qkv(), normal(B, H, S, S))
        assert len(report.fused) == 1 and not report.regions[0].hint, str(report)

    def test_mask_of_the_type_of_the_queries(self):
        # They have a gradient; what is only made of their type has none to lose.
        def attention(q, k, v, keep):
            return attend(scores_of(q, k) + keep.to(q).log(), v)

        assert_expected_inline(
            specs(check(attention, *qkv(), uniform(S, S) < 0.5)),
            """attention(score=0.25*s, mask=load(0, q, kv) != 0, dead=nan, aux=[bool])""",
        )

    def test_bias_made_of_the_scores_like_another(self):
        def attention(q, k, v, bias):
            s = scores_of(q, k)
            return attend(s + s.cumsum(-1).to(bias), v)

        assert check(attention, *qkv(), normal(S)).fused == []

    def test_no_grad_around_the_weights(self):
        # The weights are constants for the gradient, and V is not.
        def attention(q, k, v):
            with torch.no_grad():
                p = scores_of(q, k).softmax(-1)
            return p @ v

        check(attention, *qkv())

    def test_no_grad_around_the_scores(self):
        def attention(q, k, v):
            with torch.no_grad():
                s = scores_of(q, k)
            return attend(s, v)

        check(attention, *qkv())

    def test_detached_weights(self):
        check(lambda q, k, v: scores_of(q, k).softmax(-1).detach() @ v, *qkv())

    def test_detached_scores(self):
        check(lambda q, k, v: attend(scores_of(q, k).detach(), v), *qkv())

    @pytest.mark.parametrize(
        "stopped",
        [
            lambda q, k, v: plain(q, k, v).detach() * v,
            lambda q, k, v: plain(q, k, v).transpose(1, 2).detach().transpose(1, 2) * v,
            lambda q, k, v: scores_of(q, k).logsumexp(-1, True) + plain(q, k, v).detach(),
            lambda q, k, v: scores_of(q, k).logsumexp(-1, True).detach() * plain(q, k, v),
        ],
        ids=["output", "view of it", "output, and not the LSE", "LSE"],
    )
    def test_detached_result(self, stopped):
        assert specs(check(stopped, *qkv())) == PLAIN

    def test_results_of_no_grad_beside_those_of_grad(self):
        def attention(q, k, v):
            s = scores_of(q, k)
            with torch.no_grad():
                y = attend(s, v)
                z = plain(q, k, v).logsumexp(-1, True)
            return (y + z) * v + s.logsumexp(-1, True)

        check(attention, *qkv())

    def test_views_of_a_result_without_a_gradient(self):
        # Such a view says that it requires a gradient, and none flows.
        def attention(q, k, v):
            y = plain(q, k, v)
            with torch.no_grad():
                z = y.transpose(1, 2)
            return z.flatten(2) * v.transpose(1, 2).flatten(2)

        assert specs(check(attention, *qkv())) == PLAIN

    def test_views_of_operands_without_a_gradient(self):
        def attention(q, k, v):
            with torch.no_grad():
                q, k = q.view(q.shape), k.transpose(1, 2)
            return plain(q, k.transpose(1, 2), v)

        assert specs(check(attention, *qkv())) == PLAIN

    def test_detached_keys(self):
        assert specs(check(lambda q, k, v: plain(q, k.detach(), v), *qkv())) == PLAIN

    def test_detached_bias(self):
        def attention(q, k, v, bias):
            return attend(scores_of(q, k) + bias.detach() * 2, v)

        check(attention, *qkv(), normal(S, S))

    def test_detached_scale(self):
        def attention(q, k, v):
            norm = k.norm(dim=-1).mean().detach()
            return attend(scores_of(q, k) / norm, v)

        check(attention, *qkv())

    def test_detached_part_of_the_score(self):
        # The value is 2 s, the derivative that of s.
        def attention(q, k, v):
            s = scores_of(q, k)
            return attend(s + s.detach(), v)

        check(attention, *qkv())

    def test_straight_through(self):
        def attention(q, k, v):
            s = scores_of(q, k)
            return attend(s + (s.clamp(-1, 1) - s).detach(), v)

        check(attention, *qkv())

    def test_inference_mode(self):
        q, k, v = qkv()
        with torch.inference_mode():
            assert_same(plain, q, k, v, tolerance=1e-5)

    def test_inference_mode_of_the_function(self):
        """There PyTorch's compiler fails on any view, and with it all that is compiled later."""

        def left(q, k, v):
            with torch.inference_mode():
                doubled = q * 2
            with torch.inference_mode(False):
                return attend(doubled @ k.mT, v)

        q, k, v = (x.detach() for x in qkv())
        assert specs(check(in_inference_mode, q, k, v, training=False)) == "check: inference-mode"
        assert specs(check(left, q, k, v, training=False)) == "attention(score=2*s)"

    @pytest.mark.skipif(
        torch.__version__ < "2.13", reason="Inductor itself fails on it, and leaves the mode set"
    )
    def test_inference_mode_of_the_function_through_inductor(self):
        q, k, v = (x.detach() for x in qkv())
        torch.compile(in_inference_mode, backend="fa3")(q, k, v)

    def test_parameters_without_gradient(self):
        q, k, v = qkv()
        assert specs(check(plain, q.detach(), k.detach(), v)) == PLAIN
        assert specs(check(plain, q, k.detach(), v.detach())) == PLAIN

    def test_gradient_of_a_hook(self):
        def attention(q, k, v):
            q = q * 1.0
            q.register_hook(lambda g: g * 2)
            return plain(q, k, v)

        check(attention, *qkv())
