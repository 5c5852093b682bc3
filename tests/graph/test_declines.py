"""What only looks like attention is left as it was: other products, types, writes."""

from __future__ import annotations

import ast
from pathlib import Path

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn

import fa3_compile
from tests.graph.harness import check, declined, rewrite_only, specs
from tests.graph.inputs import (
    SCALE,
    B,
    D,
    H,
    S,
    attend,
    normal,
    qkv,
    scores_of,
    uniform,
    weights_of,
)


class TestNotAttention:
    """A softmax and two products are not yet attention."""

    def test_router(self):
        class Experts(nn.Module):
            def __init__(self):
                super().__init__()
                self.gate = nn.Parameter(normal(32, 8).detach())
                self.table = nn.Parameter(normal(8, 32).detach())

            def forward(self, x):
                return (x @ self.gate).softmax(-1) @ self.table

        assert_expected_inline(declined(Experts(), normal(64, 32)), """lift: router""")

    def test_router_of_top_two(self):
        def experts(x, gate, up, down):
            p = (x @ gate).softmax(-1)
            top, chosen = p.topk(2, -1)
            y = torch.einsum("td,edf->tef", x, up).relu()
            y = torch.einsum("tef,efd->ted", y, down)
            return (top[..., None] * y.gather(1, chosen[..., None].expand(-1, -1, 32))).sum(1)

        declined(experts, normal(16, 32), normal(32, 4), normal(4, 32, 8), normal(4, 8, 32))

    def test_classifier(self):
        def classify(x, weight, table):
            return F.linear(x, weight).softmax(-1) @ table

        assert_expected_inline(declined(classify, normal(5, D), normal(9, D), normal(9, 7)), """""")

    def test_softmax_without_a_product(self):
        assert_expected_inline(declined(lambda q, k, v: scores_of(q, k).softmax(-1) + 1), """""")

    def test_products_without_a_softmax(self):
        assert_expected_inline(declined(lambda q, k, v: scores_of(q, k) @ v), """lift: linear""")

    def test_rotary_embedding_is_no_attention(self):
        # Its product of positions and frequencies is a decoy; the attention behind it is one.
        def attention(q, k, v, frequencies):
            position = torch.arange(S).float().view(1, 1, S)
            angle = (frequencies.view(1, -1, 1) @ position).transpose(1, 2)
            angle = torch.cat([angle, angle], -1)
            cos, sin = angle.cos()[:, None], angle.sin()[:, None]

            def rotated(x):
                half = torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1)
                return x * cos + half * sin

            return attend(scores_of(rotated(q), rotated(k)), v)

        report = check(attention, *qkv(), uniform(D // 2))
        assert specs(report) == "attention(score=0.25*s)"

    def test_softmin(self):
        # A softmax of the negative scores is attention all the same.
        report = check(lambda q, k, v: F.softmin(scores_of(q, k), -1) @ v, *qkv())
        assert specs(report) == "attention(score=-0.25*s)"

    def test_base_two(self):
        # 2**s / sum 2**s: a softmax of another base, written by hand.
        def attention(q, k, v):
            e = torch.exp2(scores_of(q, k))
            return e / e.sum(-1, keepdim=True) @ v

        check(attention, *qkv())

    def test_distances_in_place_of_products(self):
        def attention(q, k, v):
            return (-torch.cdist(q, k)).softmax(-1) @ v

        declined(attention)


class TestTypes:
    """q, k and v are of one floating type that the kernels know."""

    def test_float64(self):
        q, k, v = (x.detach().double() for x in qkv())
        check(lambda q, k, v: attend(scores_of(q, k), v), q, k, v)

    def test_complex(self):
        def attention(q, k, v):
            return attend((q @ k.mH).real * SCALE, v)

        q, k, _ = qkv()
        q, k = torch.complex(q, k).detach(), torch.complex(k, q).detach()
        v = normal(B, H, S, D).detach()
        ours = torch.compile(attention, backend=rewrite_only)(q, k, v)
        torch.testing.assert_close(ours, attention(q, k, v))

    def test_complex_values(self):
        def attention(q, k, v):
            return torch.view_as_real(weights_of(q, k).to(v.dtype) @ v)

        q, k, _ = (x.detach() for x in qkv())
        assert_expected_inline(
            declined(attention, q, k, torch.complex(q, k), training=False),
            """lift: not-pointwise""",
        )

    def test_integers(self):
        def attention(q, k, v):
            return (q @ k.mT).float().softmax(-1) @ v

        q, k = (torch.randint(-3, 3, (B, H, S, D)) for _ in range(2))
        assert_expected_inline(
            declined(attention, q, k, normal(B, H, S, D)), """lift: mixed-dtypes"""
        )

    def test_mixed_types(self):
        def attention(q, k, v):
            return weights_of(q, k).float() @ v

        q, k, v = qkv()
        q, k = (x.detach().bfloat16().requires_grad_() for x in (q, k))
        assert_expected_inline(declined(attention, q, k, v), """lift: mixed-dtypes""")

    def test_output_of_another_type(self):
        def attention(q, k, v):
            return weights_of(q, k).double() @ v.double()

        check(attention, *(x.detach() for x in qkv()), training=False)


class TestMutation:
    """What is written in between is not read too late."""

    def test_keys_written_before_the_values_are_weighed(self):
        def attention(q, k, v):
            k = k.exp()
            s = scores_of(q, k)
            k.add_(1)
            return attend(s, v) + k.sum()

        q, k, v = (x.detach() for x in qkv())
        assert_expected_inline(
            declined(attention, q, k, v, training=False), """check: mutation-between"""
        )

    def test_keys_written_through_a_view(self):
        def attention(q, k, v):
            k = k.exp()
            s = scores_of(q, k)
            k.view(-1)[3:50].mul_(2)
            return attend(s, v), k

        q, k, v = (x.detach() for x in qkv())
        assert_expected_inline(
            declined(attention, q, k, v, training=False), """check: mutation-between"""
        )

    def test_bias_written_in_between(self):
        def attention(q, k, v, bias):
            s = scores_of(q, k) + bias
            bias.zero_()
            return attend(s, v)

        q, k, v = (x.detach() for x in qkv())
        assert_expected_inline(
            declined(attention, q, k, v, uniform(S, S), training=False),
            """check: mutation-between""",
        )

    def test_input_written_in_between(self):
        def attention(q, k, v):
            s = scores_of(q, k)
            q.copy_(v)
            return attend(s, v)

        q, k, v = (x.detach() for x in qkv())
        assert_expected_inline(
            declined(attention, q, k, v, training=False), """check: mutation-between"""
        )

    def test_output_written_into_the_query(self):
        def attention(q, k, v):
            q.copy_(attend(scores_of(q, k), v))
            return q * 2

        q, k, v = (x.detach() for x in qkv())
        report = check(attention, q, k, v, training=False)
        assert specs(report) == "attention(score=0.25*s)"

    def test_writes_before_the_attention(self):
        def attention(q, k, v):
            k, v = k * 1, v * 1
            k[:, :, 0] = 0
            v.mul_(2)
            return attend(scores_of(q, k), v)

        assert specs(check(attention, *qkv())) == "attention(score=0.25*s)"

    def test_keys_written_whose_source_is_not(self):
        # k is a copy: the op reads what it was copied from.
        def attention(q, k, v):
            k = k * 1
            s = scores_of(q, k)
            k.add_(1)
            return attend(s, v) + k.sum()

        q, k, v = (x.detach() for x in qkv())
        report = check(attention, q, k, v, training=False)
        assert specs(report) == "attention(score=0.25*s)"

    def test_values_written_between_softmax_and_product(self):
        def attention(q, k, v):
            v = v * 1
            p = weights_of(q, k)
            v.mul_(2)
            return p @ v

        assert specs(check(attention, *qkv())) == "attention(score=0.25*s)"

    def test_writes_after_the_attention(self):
        def attention(q, k, v):
            k = k * 1
            y = attend(scores_of(q, k), v)
            k.mul_(3)
            return y, k

        q, k, v = (x.detach() for x in qkv())
        report = check(attention, q, k, v, training=False)
        assert specs(report) == "attention(score=0.25*s)"

    def test_dead_writes_to_the_scores_go_with_them(self):
        def attention(q, k, v):
            s = scores_of(q, k)
            s += 1
            y = attend(s, v)
            s.zero_()
            return y

        q, k, v = (x.detach() for x in qkv())
        check(attention, q, k, v, training=False)


def test_scalars():
    def attention(q, k, v, scale, cap):
        return attend(cap * torch.tanh(q @ k.mT * scale / cap), v)

    report = check(attention, *qkv(), torch.tensor(0.25), torch.tensor(5.0))
    assert_expected_inline(
        specs(report),
        """attention(score=load(0)*tanh(load(1)*pow(load(0), -1)*s), aux=[float, float])""",
    )


def test_every_decline_says_why_and_what_to_change():
    package = Path(fa3_compile.__file__).parent
    short = []
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Decline":
                named = {k.arg: k.value for k in node.keywords}
                hint = node.args[2] if len(node.args) > 2 else named.get("hint", ast.Constant(""))
                if "message" not in named or getattr(hint, "value", "?") == "":
                    short.append(f"{file.name}:{node.lineno}")
    assert short == []
