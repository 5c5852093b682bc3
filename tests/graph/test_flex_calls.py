"""What flex_attention is called with beside its mask_mod and score_mod, and which calls are left."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)
from torch.utils.checkpoint import checkpoint

from tests.graph.flex import MARKS, block_mask, causal
from tests.graph.harness import check, specs
from tests.graph.inputs import B, D, H, S, normal, qkv

pytestmark = MARKS


class TestArguments:
    def test_plain(self):
        report = check(lambda q, k, v: flex_attention(q, k, v), *qkv())
        assert_expected_inline(specs(report), """attention(score=0.25*s)""")

    def test_scale(self):
        report = check(lambda q, k, v: flex_attention(q, k, v, scale=0.5), *qkv())
        assert_expected_inline(specs(report), """attention(score=0.5*s)""")

    def test_grouped_heads(self):
        q, k, v = qkv()
        k, v = (x[:, :2].detach().requires_grad_() for x in (k, v))
        made = block_mask(causal)

        def attention(q, k, v):
            return flex_attention(q, k, v, block_mask=made, enable_gqa=True)

        report = check(attention, q, k, v)
        assert_expected_inline(specs(report), """attention(score=0.25*s, mask=kv <= q, dead=nan)""")

    def test_shared_by_the_batch(self):
        q, k, v = qkv()
        k, v = (x[:1].detach().requires_grad_() for x in (k, v))
        made = block_mask(causal, batch=B)
        report = check(lambda q, k, v: flex_attention(q, k, v, block_mask=made), q, k, v)
        assert_expected_inline(specs(report), """attention(score=0.25*s, mask=kv <= q, dead=nan)""")

    def test_lengths_differ(self):
        q, k, v = qkv()
        made = block_mask(lambda b, h, q, kv: kv <= q + S - 5, q_len=5)
        report = check(lambda q, k, v: flex_attention(q, k, v, block_mask=made), q[:, :, :5], k, v)
        assert_expected_inline(
            specs(report), """attention(score=0.25*s, mask=kv <= q + 19, dead=nan)"""
        )

    def test_half_precision(self):
        made = block_mask(causal)

        def attention(q, k, v):
            return flex_attention(q, k, v, lambda s, b, h, q, kv: s / 2, made)

        report = check(attention, *qkv(dtype=torch.bfloat16))
        assert_expected_inline(
            specs(report), """attention(score=0.125*s, mask=kv <= q, dead=nan)"""
        )

    def test_log_sum_exp(self):
        made = block_mask(lambda b, h, q, kv: kv < q)

        def attention(q, k, v):
            y, lse = flex_attention(q, k, v, block_mask=made, return_lse=True)
            return y.transpose(1, 2).flatten(2), lse.masked_fill(lse == -float("inf"), 0)

        report = check(attention, *qkv())
        assert_expected_inline(
            specs(report),
            """attention(score=0.25*s, mask=kv <= q - 1, dead=zero, out_order=bqhd)""",
        )

    def test_log_sum_exp_of_a_row_without_keys(self):
        made = block_mask(lambda b, h, q, kv: kv < q)

        def attention(q, k, v):
            return flex_attention(q, k, v, block_mask=made, return_lse=True)[1]

        q, k, v = (x.detach() for x in qkv())
        check(attention, q, k, v, training=False)

    def test_auxiliary_outputs(self):
        def attention(q, k, v):
            y, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True))
            return y, aux.lse

        assert_expected_inline(specs(check(attention, *qkv())), """attention(score=0.25*s)""")

    def test_kernel_options_are_noted(self):
        def attention(q, k, v):
            return flex_attention(q, k, v, kernel_options={"BLOCK_M": 32})

        q, k, v = (x.detach() for x in qkv())
        report = check(attention, q, k, v, training=False)
        assert specs(report) == "attention(score=0.25*s)"
        assert ["BLOCK_M" in note for note in report.notes] == [True]

    def test_autocast(self):
        def attention(x, weight):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                q, k, v = nn.functional.linear(x, weight).view(B, S, 3, H, D).unbind(2)
                return flex_attention(*(t.transpose(1, 2) for t in (q, k, v)))

        report = check(attention, normal(B, S, 16), normal(3 * H * D, 16), training=False)
        assert_expected_inline(specs(report), """attention(score=0.25*s, out_order=bqhd)""")

    def test_checkpointed(self):
        made = block_mask(causal)

        def attention(q, k, v):
            def part(q, k, v):
                return flex_attention(q, k, v, block_mask=made)

            return checkpoint(part, q, k, v, use_reentrant=False)

        report = check(attention, *qkv())
        assert_expected_inline(specs(report), """attention(score=0.25*s, mask=kv <= q, dead=nan)""")

    def test_dynamic_lengths(self):
        def attention(q, k, v):
            return flex_attention(q, k, v, lambda s, b, h, q, kv: s - (q - kv).abs())

        report = check(attention, *qkv(), dynamic=True)
        assert_expected_inline(specs(report), """attention(score=0.25*s - abs(kv - q))""")

    @pytest.mark.skipif(
        torch.__version__ >= "2.15",
        reason="torch 2.15 takes no symbolic float for a score_mod, whatever the backend",
    )
    def test_numbers_that_change(self):
        def attention(q, k, v, scale):
            n = k.size(2) // 2
            return flex_attention(
                q, k, v, lambda s, b, h, q, kv: s.mul(n) * scale + torch.where(kv < n, 0.0, n)
            )

        inputs = (x.detach() for x in qkv())
        report = check(attention, *inputs, 0.3, dynamic=True, training=False)
        assert_expected_inline(
            specs(report),
            """attention(score=0.25*floordiv(Skv, 2)*load(0)*s + where(kv <= floordiv(Skv, 2) - 1, 0, floordiv(Skv, 2)), dead=zero, aux=[float])""",
        )

    def test_two_calls(self):
        made = block_mask(causal)

        def attention(q, k, v):
            y = flex_attention(q, k, v, block_mask=made)
            return flex_attention(y, k, v)

        assert_expected_inline(
            specs(check(attention, *qkv())),
            """\
attention(score=0.25*s, mask=kv <= q, dead=nan)
attention(score=0.25*s)""",
        )


class TestBlockLists:
    """Lists of blocks that say something else than the mask_mod are the mask to flex's kernels;
    such a call is left to them."""

    def lists(self):
        counts = torch.tensor([[[1, 2, 1]]], dtype=torch.int32)
        indices = torch.tensor([[[[0, 1, 2], [0, 1, 2], [2, 0, 1]]]], dtype=torch.int32)
        return counts, indices

    def outcome(self, made: BlockMask) -> str:
        q, k, v = (x.detach() for x in qkv())
        return specs(
            check(lambda q, k, v: flex_attention(q, k, v, block_mask=made), q, k, v, training=False)
        )

    def test_lists_alone(self):
        made = BlockMask.from_kv_blocks(*self.lists(), BLOCK_SIZE=8)
        assert self.outcome(made) == "trace: block-lists"

    def test_lists_and_a_mask(self):
        made = BlockMask.from_kv_blocks(*self.lists(), BLOCK_SIZE=8, mask_mod=causal)
        assert self.outcome(made) == "trace: block-lists"

    def test_full_blocks_that_are_not(self):
        counts, indices = self.lists()
        none = torch.zeros_like(counts)
        made = BlockMask.from_kv_blocks(none, indices, counts, indices, 8, causal)
        assert self.outcome(made) == "trace: block-lists"

    def test_lists_that_agree(self):
        full = block_mask(causal)
        made = BlockMask.from_kv_blocks(
            full.kv_num_blocks,
            full.kv_indices,
            full.full_kv_num_blocks,
            full.full_kv_indices,
            8,
            causal,
        )
        assert self.outcome(made) == "attention(score=0.25*s, mask=kv <= q, dead=nan)"

    def test_lists_that_agree_under_a_default_dtype_of_16_bits(self):
        """Position 299 is 300 in bfloat16, and 300 the next document's."""
        made = create_block_mask(
            lambda b, h, q, kv: q // 300 == kv // 300, None, None, 600, 600, "cpu", 300
        )
        q, k, v = (torch.randn(1, 1, 600, 8) for _ in range(3))

        def attention(q, k, v):
            return flex_attention(q, k, v, block_mask=made)

        torch.set_default_dtype(torch.bfloat16)
        try:
            found = check(attention, q, k, v, training=False)
        finally:
            torch.set_default_dtype(torch.float32)
        assert specs(found).startswith("attention(")

    def test_all_blocks_and_no_mask(self):
        made = block_mask(lambda b, h, q, kv: q >= 0)
        assert self.outcome(made) == "attention(score=0.25*s)"

    @pytest.mark.parametrize("offset", [8, 0], ids=["moved", "not moved"])
    def test_rows_of_blocks_taken_inside(self, offset):
        # As gpt-fast decodes: the mask's blocks of one row, and a mask_mod that counts from there.
        made = block_mask(causal)

        def attention(q, k, v, position):
            rows = made[:, :, position // 8]
            rows.mask_mod = lambda b, h, q, kv: causal(b, h, q + position[0] if offset else q, kv)
            rows.seq_lengths = (8, S)
            return flex_attention(q, k, v, block_mask=rows)

        q, k, v = (x.detach() for x in qkv())
        inputs = q[:, :, :8].contiguous(), k, v, torch.tensor([8])
        # PyTorch's eager code does not look at the lists: only what was moved is what they say.
        found = specs(check(attention, *inputs, training=False))
        assert found.startswith("attention(" if offset else "trace: block-lists")

    def test_computed_by_the_program(self):
        def attention(q, k, v):
            means = q.view(B, H, 3, 8, D).mean(3) @ k.view(B, H, 3, 8, D).mean(3).mT
            best = means.topk(2, -1).indices.sort(-1).values.int()
            indices = torch.cat([best, torch.zeros_like(best[..., :1])], -1)
            counts = torch.full((B, H, 3), 2, dtype=torch.int32)
            made = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=8, mask_mod=causal)
            return flex_attention(q, k, v, block_mask=made)

        q, k, v = (x.detach() for x in qkv())
        assert specs(check(attention, q, k, v, training=False)) == "trace: block-lists"


class TestLeftAlone:
    """What is no pointwise score: flex's own lowering runs."""

    def test_cross_key_score(self):
        def attention(q, k, v, bias):
            def score(s, b, h, q, kv):
                return s + bias[q].sum()

            return flex_attention(q, k, v, score)

        bias = normal(S, S).detach()
        report = check(attention, *(x.detach() for x in qkv()), bias, training=False)
        assert_expected_inline(specs(report), """lift: not-pointwise""")

    def test_score_without_the_product(self):
        def attention(q, k, v, bias):
            return flex_attention(q, k, v, lambda s, b, h, q, kv: bias[q, kv])

        inputs = (*qkv(), normal(S, S))
        report = check(attention, *(x.detach() for x in inputs), training=False)
        assert_expected_inline(specs(report), """""")

    def test_capture_written_afterwards(self):
        def attention(q, k, v, slopes):
            y = flex_attention(q, k, v, lambda s, b, h, q, kv: s + slopes[h] * kv)
            slopes.zero_()
            return y.transpose(1, 2).flatten(2)

        inputs = (*qkv(), normal(H))
        report = check(attention, *(x.detach() for x in inputs), training=False)
        assert_expected_inline(specs(report), """check: mutation-between""")

    def test_scores_computed_again(self):
        def attention(q, k, v):
            y = flex_attention(q, k, v)
            return y, (q @ k.mT).amax(-1)

        q, k, v = (x.detach() for x in qkv())
        report = check(attention, q, k, v, training=False)
        assert_expected_inline(specs(report), """attention(score=0.25*s)""")

    def test_mixed_dtypes(self):
        q, k, v = (x.detach() for x in qkv())

        def attention(q, k, v):
            return flex_attention(q, k.bfloat16(), v.bfloat16())

        report = check(attention, q, k, v, training=False)
        assert not report.fused
