"""torch.func in and around compiled functions: masks made by vmap, attention under transforms."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline

from fa3_compile.report import collect
from tests.graph.harness import check, rewrite_only, specs
from tests.graph.inputs import INF, B, D, H, S, attend, normal, plain, qkv, scores_of

PLAIN = "attention(score=0.25*s)"


def causal(q, k, v):
    mask = torch.ones(S, S, dtype=torch.bool).tril()
    return attend(scores_of(q, k).masked_fill(~mask, -INF), v)


def run(function, *args):
    """(report, result) of a function under the pass; tensors without gradients."""
    torch._dynamo.reset()
    with collect() as report:
        result = torch.compile(function, backend=rewrite_only)(*(x.detach() for x in args))
    return report, result


def assert_same(function, *args):
    """What became of the function's regions; its numbers are eager's."""
    report, ours = run(function, *args)
    torch.testing.assert_close(ours, function(*(x.detach() for x in args)), atol=1e-4, rtol=1e-4)
    return report


class TestMasksMadeByVmap:
    """As transformers makes its masks."""

    def test_over_positions(self):
        def attention(q, k, v):
            def visible(q, kv):
                return (kv <= q) & (q - kv < 6)

            at = torch.arange(S)
            mask = torch.vmap(torch.vmap(visible, (None, 0)), (0, None))(at, at)
            return attend(scores_of(q, k).masked_fill(~mask, -INF), v)

        assert_expected_inline(
            specs(check(attention, *qkv())),
            """attention(score=0.25*s, mask=(kv <= q) & (kv >= q - 5), dead=nan)""",
        )

    def test_over_all_four_axes_with_padding(self):
        def attention(q, k, v, padding):
            def visible(b, h, q, kv):
                return (kv <= q) & padding[b, kv]

            mask = visible
            for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None)):
                mask = torch.vmap(mask, dims)
            mask = torch.vmap(mask, (0, None, None, None))
            with torch._dynamo._trace_wrapped_higher_order_op.TransformGetItemToIndex():
                mask = mask(*(torch.arange(n) for n in (B, 1, S, S)))
            return attend(scores_of(q, k).masked_fill(~mask, -INF), v)

        padding = torch.arange(S) < torch.tensor([[S], [9]])
        assert_expected_inline(
            specs(check(attention, *qkv(), padding)),
            """attention(score=0.25*s, mask=(kv <= q) & (load(0, b, kv) != 0), dead=nan, aux=[bool])""",
        )

    def test_nothing_of_the_vmap_is_left(self):
        graphs = []

        def keep(gm, inputs, **_):
            rewrite_only(gm, inputs)
            graphs.append([str(node.target) for node in gm.graph.nodes])
            return gm

        def attention(q, k, v):
            at = torch.arange(S)
            mask = torch.vmap(lambda i: at <= i)(at)
            return attend(scores_of(q, k).masked_fill(~mask, -INF), v)

        torch.compile(attention, backend=keep)(*qkv())
        assert not [name for name in graphs[0] if "nesting" in name or "batch_dim" in name]

    def test_bias_made_by_vmap_has_its_gradient(self):
        def attention(q, k, v, slopes):
            at = torch.arange(S)
            bias = torch.vmap(lambda slope: slope * (at[None] - at[:, None]))(slopes)
            return attend(scores_of(q, k) + bias, v)

        report = check(attention, *qkv(), normal(H))
        assert_expected_inline(
            specs(report), """attention(score=(kv - q)*load(0, h) + 0.25*s, aux=[float])"""
        )

    def test_detached_inside(self):
        def attention(q, k, v, slopes):
            at = torch.arange(S)
            bias = torch.vmap(lambda slope: slope.detach() * (at[None] - at[:, None]))(slopes)
            return attend(scores_of(q, k) + bias, v)

        check(attention, *qkv(), normal(H))


class TestAttentionUnderVmap:
    """Batched: one attention for all that is mapped."""

    def test_over_batch_and_heads(self):
        report = assert_same(lambda *x: torch.vmap(torch.vmap(causal))(*x), *qkv())
        assert specs(report) == "attention(score=0.25*s, mask=kv <= q, dead=nan)"

    def test_gradients(self):
        report = check(lambda *x: torch.vmap(plain)(*x), *qkv())
        assert specs(report) == PLAIN

    def test_shared_keys(self):
        q, k, v = qkv()

        def attention(q, k, v):
            return torch.vmap(plain, (0, None, None))(q, k, v)

        assert specs(assert_same(attention, q, k[0], v[0])) == PLAIN

    def test_mapped_axis_in_the_middle(self):
        def attention(q, k, v):
            return torch.vmap(plain, 2, 2)(q, k, v)

        assert specs(assert_same(attention, *qkv(B, S, H, D))) == PLAIN

    def test_projections_inside(self):
        weight = normal(D, D)

        def attention(x, k, v):
            def one(x, k, v):
                return plain(torch.nn.functional.linear(x, weight.detach()), k, v)

            return torch.vmap(one)(x, k, v)

        assert_same(attention, *qkv())

    def test_weights_returned_too(self):
        def attention(q, k, v):
            def one(q, k, v):
                p = scores_of(q, k).softmax(-1)
                return p @ v, p

            return torch.vmap(one)(q, k, v)

        assert specs(assert_same(attention, *qkv())) == PLAIN

    def test_output_used_inside(self):
        def attention(q, k, v):
            def one(q, k, v):
                y = plain(q, k, v)
                return y * y.amax(-1, keepdim=True)

            return torch.vmap(one)(q, k, v)

        report = assert_same(attention, *qkv())
        assert specs(report) == "detect: output-unclear"
        assert "inside the torch.vmap" in report.regions[0].reason

    @pytest.mark.parametrize("drops", [False, True])
    def test_dropout_inside(self, drops):
        def attention(q, k, v):
            def one(q, k, v):
                p = torch.nn.functional.dropout(scores_of(q, k).softmax(-1), 0.5, drops)
                return p @ v

            return torch.vmap(one, randomness="different")(q, k, v)

        report, _ = run(attention, *qkv())
        assert specs(report) == ("trace: functorch" if drops else PLAIN)


class TestDerivatives:
    """Regions under grad and jvp stay as they are, and the report says so."""

    @pytest.mark.parametrize(
        "transform",
        [
            lambda f: lambda q, k, v: torch.func.grad(lambda q: f(q, k, v).square().sum())(q),
            lambda f: lambda q, k, v: torch.func.jvp(lambda q: f(q, k, v), (q,), (v,))[1],
            lambda f: lambda q, k, v: torch.func.vjp(lambda q: f(q, k, v), q)[1](v)[0],
            lambda f: torch.vmap(torch.func.grad(lambda q, k, v: f(q, k, v).sin().sum())),
        ],
        ids=["grad", "jvp", "vjp", "vmap of grad"],
    )
    def test_inside(self, transform):
        report = assert_same(transform(plain), *qkv())
        assert [r.code for r in report.regions] == ["functorch"]

    def test_attention_beside_it_is_fused(self):
        def attention(q, k, v):
            slope = torch.func.grad(lambda x: (x.exp() / x.exp().sum()).square().sum())(q)
            return plain(q, k, v) + slope

        assert specs(assert_same(attention, *qkv())) == PLAIN

    def test_attention_of_its_result_is_fused(self):
        def attention(q, k, v):
            return plain(torch.func.grad(lambda x: x.sin().sum())(q), k, v)

        assert specs(assert_same(attention, *qkv())) == PLAIN

    def test_grad_of_a_compiled_function(self):
        q, k, v = (x.detach() for x in qkv())

        def gradient(function):
            return torch.func.grad(lambda q: function(q, k, v).square().sum())(q)

        ours = gradient(torch.compile(plain, backend=rewrite_only))
        torch.testing.assert_close(ours, gradient(plain), atol=1e-4, rtol=1e-4)

    def test_vmap_of_a_compiled_function(self):
        q, k, v = (x.detach() for x in qkv())
        ours = torch.vmap(torch.compile(plain, backend=rewrite_only))(q, k, v)
        torch.testing.assert_close(ours, plain(q, k, v), atol=1e-5, rtol=1e-5)
