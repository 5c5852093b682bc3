"""Attention inside other things: fused, or declined, and in each case eager's numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn
from torch.utils.checkpoint import checkpoint

from fa3_compile.report import collect
from tests.graph.harness import assert_same, check, compiled, specs
from tests.graph.inputs import (
    INF,
    PLAIN,
    B,
    D,
    H,
    S,
    attend,
    normal,
    plain,
    qkv,
    scores_of,
    uniform,
)


class TestAutocast:
    """Casts that autocast inserts are part of the program."""

    def test_inside(self):
        def attention(q, k, v):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return plain(q, k, v)

        report = check(attention, *qkv(), training=False)
        assert specs(report) == PLAIN

    def test_outside(self):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            report = check(plain, *qkv(), training=False)
        assert specs(report) == PLAIN

    def test_gradients(self):
        def attention(q, k, v):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return F.scaled_dot_product_attention(q * 2, k, v)

        assert_expected_inline(specs(check(attention, *qkv())), """attention(score=0.25*s)""")

    def test_scale_before_the_cast(self):
        # The cast rounds what was scaled: the scale is no part of the score.
        def attention(q, k, v):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return attend((q * 0.3) @ k.mT, v)

        report = check(attention, *qkv(), training=False)
        assert_expected_inline(specs(report), """attention(score=s)""")

    def test_projections_inside(self):
        torch.manual_seed(0)
        q_of, k_of, v_of = (nn.Linear(D, D) for _ in range(3))

        def attention(x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return plain(q_of(x), k_of(x), v_of(x))

        assert_same(attention, normal(B, H, S, D), tolerance=0.02)

    def test_disabled_inside(self):
        def attention(q, k, v):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                q = q @ torch.eye(D)
                with torch.autocast("cpu", enabled=False):
                    return plain(q.float(), k, v)

        assert specs(check(attention, *qkv(), training=False)) == PLAIN


class TestCheckpointing:
    def test_whole_attention(self):
        def attention(q, k, v):
            return checkpoint(plain, q, k, v, use_reentrant=False)

        assert specs(check(attention, *qkv())) == PLAIN

    def test_block_of_a_model(self):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))

            def forward(self, x):
                mask = torch.full((S, S), -INF).triu(1)
                return x + attend(scores_of(self.q(x), self.k(x)) + mask, self.v(x))

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList(Block() for _ in range(2))

            def forward(self, x):
                for block in self.blocks:
                    x = checkpoint(block, x, use_reentrant=False)
                return x

        report = check(Model(), normal(B, H, S, D))
        assert specs(report) == "\n".join(["attention(score=0.25*s, mask=kv <= q, dead=nan)"] * 2)

    def test_products_on_different_sides(self):
        def attention(q, k, v):
            p = checkpoint(lambda q, k: scores_of(q, k).softmax(-1), q, k, use_reentrant=False)
            return p @ v

        check(attention, *qkv())


class TestAutogradFunctions:
    def test_attention_inside_an_autograd_function(self):
        class Halved(torch.autograd.Function):
            @staticmethod
            def forward(ctx, q, k, v):
                y = plain(q, k, v)
                ctx.save_for_backward(q, y)
                return y

            @staticmethod
            def backward(ctx, g):
                q, y = ctx.saved_tensors
                return g * y, g * q, g / 2

        report = check(lambda q, k, v: Halved.apply(q, k, v), *qkv())
        assert len(report.regions) <= 1

    def test_autograd_function_inside_an_attention(self):
        class Clipped(torch.autograd.Function):
            """The identity, with a clipped gradient."""

            @staticmethod
            def forward(ctx, s):
                return s.clone()

            @staticmethod
            def backward(ctx, g):
                return g.clamp(-0.001, 0.001)

        check(lambda q, k, v: attend(Clipped.apply(scores_of(q, k)), v), *qkv())

    def test_autograd_function_on_the_query(self):
        class Doubled(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * 1

            @staticmethod
            def backward(ctx, g):
                return g * 2

        report = check(lambda q, k, v: plain(Doubled.apply(q), k, v), *qkv())
        assert specs(report) == PLAIN


def test_tensors_of_several():
    from torch.testing._internal.two_tensor import TwoTensor

    def attention(q, k, v, x):
        return plain(q, k, v), plain(x, x, x)

    pairs = [TwoTensor(x.detach(), 2 * x.detach()) for x in qkv()]
    args = (*pairs, normal(B, H, S, D, seed=4).detach())
    with collect() as report:
        ours = compiled(attention)(*args)
    torch.testing.assert_close(
        [ours[0].a, ours[0].b, ours[1]],
        [plain(*(x.a for x in pairs)), plain(*(x.b for x in pairs)), plain(*args[3:] * 3)],
    )
    assert specs(report) == f"trace: tensor-subclass\n{PLAIN}"


class TestControlFlow:
    def test_loop_over_layers(self):
        def attention(q, k, v):
            for _ in range(2):
                v = plain(q, k, v)
            return v

        assert specs(check(attention, *qkv())) == f"{PLAIN}\n{PLAIN}"

    def test_branch_on_a_value(self):
        def attention(q, k, v):
            y = plain(q, k, v)
            return y if y.sum() > 0 else -y

        assert specs(check(attention, *qkv())) == PLAIN

    def test_cond(self):
        def attention(q, k, v):
            return torch.cond(
                q.sum() > 0, lambda q, k, v: plain(q, k, v), lambda q, k, v: v + q + k, (q, k, v)
            )

        assert_same(attention, *(x.detach() for x in qkv()), tolerance=1e-5)

    def test_item_as_a_scale(self):
        def attention(q, k, v, scale):
            return attend(q @ k.mT * scale.item(), v)

        with torch._dynamo.config.patch(capture_scalar_outputs=True):
            check(attention, *qkv(), torch.tensor(0.5))

    def test_shape_that_depends_on_data(self):
        def attention(q, k, v, keep):
            kept = keep.nonzero()[:, 0]
            return plain(q, k[:, :, kept], v[:, :, kept])

        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            check(attention, *qkv(), torch.arange(S) % 3 > 0)


class TestWrites:
    def test_mask_written_row_by_row(self):
        def attention(q, k, v):
            mask = torch.zeros(S, S)
            for i in range(3):
                mask[i, i + 1 :] = -INF
            return attend(scores_of(q, k) + mask, v)

        assert [r.fused for r in check(attention, *qkv()).regions] == [True]

    def test_mask_written_in_blocks(self):
        def attention(q, k, v):
            mask = torch.full((S, S), -INF)
            for begin in range(0, S, 8):
                mask[begin : begin + 8, begin : begin + 8] = 0
            return attend(scores_of(q, k) + mask, v)

        assert [r.fused for r in check(attention, *qkv()).regions] == [True]

    def test_mask_filled_in_place(self):
        def attention(q, k, v, padding):
            mask = torch.zeros(B, 1, 1, S)
            mask.masked_fill_(padding[:, None, None], torch.finfo(q.dtype).min)
            mask += 0.5
            return attend(scores_of(q, k).add_(mask), v)

        padding = torch.arange(S) < torch.tensor([[0], [5]])
        assert_expected_inline(
            specs(check(attention, *qkv(), padding)),
            """attention(score=0.25*s + 0.5, mask=load(0, b, kv) == 0, dead=score, fill=0.25*s - 3.4028234663852886e+38, aux=[bool])""",
        )

    def test_out_argument(self):
        def attention(q, k, v):
            s = torch.empty(B, H, S, S)
            torch.matmul(q, k.mT, out=s)
            return attend(s, v)

        assert_same(attention, *(x.detach() for x in qkv()), tolerance=1e-5)

    def test_output_written_into_a_buffer(self):
        def attention(q, k, v, out):
            out.copy_(plain(q, k, v))
            out[:, :, 0] = 0
            return out + 1

        q, k, v = (x.detach() for x in qkv())
        assert specs(check(attention, q, k, v, torch.zeros_like(q), training=False)) == PLAIN

    def test_cache_written_in_place(self):
        def attention(q, k, v, cache_k, cache_v):
            cache_k[:, :, 9:10] = k
            cache_v[:, :, 9:10] = v
            return plain(q, cache_k[:, :, :10], cache_v[:, :, :10])

        q, k, v = (x.detach() for x in qkv(B, H, 1, D))
        caches = (uniform(B, H, 16, D, seed=s) for s in (4, 5))
        assert specs(check(attention, q, k, v, *caches, training=False)) == PLAIN


class Embedded(nn.Module):
    """Weights tied to an embedding that the attention reads too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, H * D)

    def forward(self, tokens):
        x = self.table(tokens).view(B, S, H, D).transpose(1, 2)
        y = plain(x, x, x).transpose(1, 2).flatten(2)
        return F.linear(y, self.table.weight)


def test_tied_embedding():
    report = check(Embedded(), torch.randint(11, (B, S)))
    assert [region.fused for region in report.regions] == [True]


def test_fused_twice_in_one_process():
    function = compiled(plain)
    q, k, v = qkv()
    first = function(q, k, v)
    torch._dynamo.reset()
    assert torch.equal(first, compiled(plain)(q, k, v))


def test_deepcopy_of_the_model_compiles_alike():
    import copy

    model = Embedded()
    tokens = torch.randint(11, (B, S))
    assert torch.equal(compiled(model)(tokens), compiled(copy.deepcopy(model))(tokens))


def test_random_state_is_left_alone():
    def attention(q, k, v):
        noise = torch.randn(S, S)
        return attend(scores_of(q, k) + noise, v), torch.rand(3)

    q, k, v = qkv()
    torch.manual_seed(3)
    expected = attention(q, k, v)
    torch.manual_seed(3)
    ours = compiled(attention)(q, k, v)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
