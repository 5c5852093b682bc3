"""flex_attention calls, masks and score modifiers as attention-gym has them; numbers of flex's own
eager code in float64, gradients included (which PyTorch refuses on the CPU only for want of a
kernel)."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import (
    BlockMask,
    and_masks,
    create_block_mask,
    flex_attention,
    or_masks,
)
from torch.utils.checkpoint import checkpoint

from fa3_compile.report import Report
from tests.graph.harness import check, specs
from tests.graph.inputs import B, D, H, S, attend, normal, qkv, scores_of

pytestmark = pytest.mark.filterwarnings("ignore:.*flex_attention.*", "ignore:.*return_lse.*")


@pytest.fixture(autouse=True)
def gradients_on_the_cpu(monkeypatch):
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)


def block_mask(mask_mod, q_len=S, kv_len=S, batch=None, heads=None, block=8) -> BlockMask:
    return create_block_mask(mask_mod, batch, heads, q_len, kv_len, "cpu", block)


def masked(mask_mod, *args, training=True) -> Report:
    """An attention with this mask: made outside, and the lists of blocks given to the function."""
    made = block_mask(mask_mod)
    inputs = args or qkv()
    return check(lambda q, k, v: flex_attention(q, k, v, block_mask=made), *inputs)


def scored(score_mod, *captured) -> Report:
    """An attention whose score modifier has captured tensors after its own arguments."""

    def attention(q, k, v, *captured):
        return flex_attention(q, k, v, score_mod=lambda *x: score_mod(*x, *captured))

    return check(attention, *qkv(), *captured)


def causal(b, h, q, kv):
    return q >= kv


class TestMasks:
    def test_causal(self):
        assert_expected_inline(
            specs(masked(causal)), """attention(score=0.25*s, mask=kv <= q, dead=nan)"""
        )

    def test_sliding_window(self):
        def mask(b, h, q, kv):
            return (q >= kv) & (q - kv <= 5)

        assert_expected_inline(
            specs(masked(mask)),
            """attention(score=0.25*s, mask=(kv <= q) & (kv >= q - 5), dead=nan)""",
        )

    def test_prefix(self):
        assert_expected_inline(
            specs(masked(or_masks(causal, lambda b, h, q, kv: kv < 7))),
            """attention(score=0.25*s, mask=(kv <= 6) | (kv <= q), dead=nan)""",
        )

    def test_dilated_window(self):
        def mask(b, h, q, kv):
            near = (q - kv).abs() <= 6
            return near & ((q - kv) % 2 == 0)

        assert_expected_inline(
            specs(masked(mask)),
            """attention(score=0.25*s, mask=(kv <= q + 6) & (kv >= q - 6) & (mod(q - kv, 2) == 0), dead=nan)""",
        )

    def test_documents(self):
        ids = torch.tensor([0] * 7 + [1] * 9 + [2] * 8)

        def mask(b, h, q, kv):
            return (ids[q] == ids[kv]) & (q >= kv)

        assert_expected_inline(
            specs(masked(mask)),
            """attention(score=0.25*s, mask=(kv <= q) & (load(0, q) == load(0, kv)), dead=nan, aux=[int])""",
        )

    def test_documents_with_positions_of_their_own(self):
        offsets = torch.tensor([0] * 7 + [7] * 9 + [16] * 8)

        def mask(b, h, q, kv):
            same = offsets[q] == offsets[kv]
            return same & (kv - offsets[kv] < 3) & (q - offsets[q] >= kv - offsets[kv])

        assert masked(mask).fused

    def test_neighbourhood_of_an_image(self):
        # NATTEN: keys within a window whose middle is kept inside the image.
        width, reach = 6, 1

        def mask(b, h, q, kv):
            qx, qy, kx, ky = q // width, q % width, kv // width, kv % width
            cx = qx.clamp(reach, S // width - 1 - reach)
            cy = qy.clamp(reach, width - 1 - reach)
            return ((cx - kx).abs() <= reach) & ((cy - ky).abs() <= reach)

        assert_expected_inline(
            specs(masked(mask)),
            """attention(score=0.25*s, mask=(-1 <= floordiv(kv, 6) - min(2, max(1, floordiv(q, 6)))) & (-1 <= mod(kv, 6) - min(4, max(1, mod(q, 6)))) & (floordiv(kv, 6) - min(2, max(1, floordiv(q, 6))) <= 1) & (mod(kv, 6) - min(4, max(1, mod(q, 6))) <= 1), dead=zero)""",
        )

    def test_different_in_each_head(self):
        windows = torch.tensor([1, 3, 6, 24])

        def mask(b, h, q, kv):
            return (q >= kv) & (q - kv < windows[h])

        made = block_mask(mask, heads=H)
        report = check(lambda q, k, v: flex_attention(q, k, v, block_mask=made), *qkv())
        assert_expected_inline(
            specs(report),
            """attention(score=0.25*s, mask=(kv <= q) & (q - kv < load(0, h)), dead=zero, aux=[int])""",
        )

    def test_padding_in_each_batch_element(self):
        lengths = torch.tensor([24, 13])

        def mask(b, h, q, kv):
            return kv < lengths[b]

        made = block_mask(mask, batch=B)
        report = check(lambda q, k, v: flex_attention(q, k, v, block_mask=made), *qkv())
        assert_expected_inline(
            specs(report), """attention(score=0.25*s, mask=kv < load(0, b), dead=zero, aux=[int])"""
        )

    def test_images_between_text(self):
        # Transfusion: causal, and whole within each image.
        images = torch.tensor([-1] * 4 + [0] * 6 + [-1] * 3 + [1] * 8 + [-1] * 3)

        def within(b, h, q, kv):
            return (images[q] == images[kv]) & (images[q] >= 0)

        assert_expected_inline(
            specs(masked(or_masks(causal, within))),
            """attention(score=0.25*s, mask=((load(0, q) == load(0, kv)) & (load(0, q) >= 0)) | (kv <= q), dead=nan, aux=[int])""",
        )

    def test_combined(self):
        def far(b, h, q, kv):
            return q - kv < 9

        assert_expected_inline(
            specs(masked(and_masks(causal, far))),
            """attention(score=0.25*s, mask=(kv <= q) & (kv >= q - 8), dead=nan)""",
        )

    def test_rows_without_keys_are_zero(self):
        def mask(b, h, q, kv):
            return (kv < q) & (q % 5 != 0)

        assert_expected_inline(
            specs(masked(mask)),
            """attention(score=0.25*s, mask=(kv <= q - 1) & (mod(q, 5) != 0), dead=zero)""",
        )

    def test_made_inside_the_function(self):
        def attention(q, k, v):
            made = block_mask(causal)
            return flex_attention(q, k, v, block_mask=made)

        report = check(attention, *qkv())
        assert_expected_inline(specs(report), """attention(score=0.25*s, mask=kv <= q, dead=nan)""")

    def test_made_inside_of_an_input(self):
        def attention(q, k, v, ids):
            made = block_mask(lambda b, h, q, kv: ids[b, q] == ids[b, kv], batch=B)
            return flex_attention(q, k, v, block_mask=made)

        ids = torch.arange(S) // torch.tensor([[5], [11]])
        assert_expected_inline(
            specs(check(attention, *qkv(), ids)),
            """attention(score=0.25*s, mask=load(0, b, q) == load(0, b, kv), dead=nan, aux=[int])""",
        )


class TestScores:
    def test_alibi(self):
        def score(s, b, h, q, kv, slopes):
            return s + (kv - q) * slopes[h]

        report = scored(score, normal(H))
        assert_expected_inline(
            specs(report),
            """attention(score=(kv - q)*load(0, h) + 0.25*s, dead=zero, aux=[float])""",
        )

    def test_slopes_computed_from_the_head(self):
        # No tensor of the program holds them: they are computed in the kernel.
        def score(s, b, h, q, kv):
            return s + (kv - q) * torch.exp2(-(h + 1) * 8.0 / H)

        assert_expected_inline(
            specs(scored(score)),
            """attention(score=(0.25*kv - 0.25*q)*exp(-1.3862943611198906*h) + 0.25*s)""",
        )

    def test_steps_of_a_computed_function(self):
        # The last bit of a logarithm would decide.
        def score(s, b, h, q, kv):
            return s + torch.log2((q - kv).abs() + 1.0).floor()

        assert_expected_inline(specs(scored(score)), """lift: not-pointwise""")

    def test_softcap(self):
        report = scored(lambda s, b, h, q, kv: torch.tanh(s / 20) * 20)
        assert_expected_inline(specs(report), """attention(score=20*tanh(0.0125*s))""")

    def test_relative_position(self):
        report = scored(lambda s, b, h, q, kv: s + (q - kv))
        assert_expected_inline(specs(report), """attention(score=q + 0.25*s - kv)""")

    def test_table_of_relative_positions(self):
        def score(s, b, h, q, kv, table):
            return s + table[h, (q - kv).clamp(-4, 4) + 4]

        assert_expected_inline(
            specs(scored(score, normal(H, 9))),
            """attention(score=load(0, h, min(4, max(-4, q - kv)) + 4) + 0.25*s, dead=zero, aux=[float])""",
        )

    def test_table_read_at_places_that_are_read(self):
        def score(s, b, h, q, kv, table, place):
            return s + table[place[q, kv].abs(), h]

        assert_expected_inline(
            specs(scored(score, normal(9, H), torch.randint(0, 9, (S, S)))),
            """attention(score=load(1, abs(load(0, q, kv)), h) + 0.25*s, dead=zero, aux=[int, float])""",
        )

    def test_mask_read_at_places_that_are_read(self):
        def score(s, b, h, q, kv, page, document):
            at = page[b, kv // 8] * 8 + kv % 8
            return torch.where(document[b, at] == document[b, q], s, -float("inf"))

        pages = torch.stack([torch.randperm(S // 8) for _ in range(B)])
        report = scored(score, pages, torch.randint(0, 3, (B, S)))
        assert "mask=load(1, b, where(8*load(0, b, floordiv(kv, 8))" in specs(report)

    def test_bias(self):
        def score(s, b, h, q, kv, bias):
            return s + bias[b, h, q, kv]

        assert_expected_inline(
            specs(scored(score, normal(B, H, S, S))),
            """attention(score=load(0, b, h, q, kv) + 0.25*s, dead=zero, aux=[float])""",
        )

    def test_bias_of_pairs(self):
        report = scored(lambda s, b, h, q, kv, bias: s + bias[q, kv], normal(S, S))
        assert_expected_inline(
            specs(report), """attention(score=load(0, q, kv) + 0.25*s, dead=zero, aux=[float])"""
        )

    def test_temperature_of_a_head(self):
        report = scored(lambda s, b, h, q, kv, log: s * log[h].exp(), normal(H))
        assert_expected_inline(
            specs(report), """attention(score=0.25*exp(load(0, h))*s, dead=zero, aux=[float])"""
        )

    def test_mask_by_score(self):
        def score(s, b, h, q, kv):
            return torch.where(q >= kv, s, -float("inf"))

        assert_expected_inline(
            specs(scored(score)), """attention(score=0.25*s, mask=kv <= q, dead=nan)"""
        )

    def test_detached_score(self):
        # The value is 2 s, the derivative that of s.
        assert not scored(lambda s, b, h, q, kv: s + s.detach()).fused

    def test_detached_score_without_gradients(self):
        def attention(q, k, v):
            return flex_attention(q, k, v, lambda s, b, h, q, kv: s + s.detach())

        q, k, v = (x.detach() for x in qkv())
        report = check(attention, q, k, v, training=False)
        assert_expected_inline(specs(report), """attention(score=0.5*s)""")

    def test_detached_captures(self):
        def attention(q, k, v, bias, slopes):
            def score(s, b, h, q, kv):
                with torch.no_grad():
                    slope = slopes[h].exp()
                return s * slope + bias[q, kv].detach()

            if torch.compiler.is_compiling():
                return flex_attention(q, k, v, score)
            # The eager backward of flex_attention fails where a capture has no gradient.
            return attend(scores_of(q, k) * slopes.detach().exp()[:, None, None] + bias.detach(), v)

        report = check(attention, *qkv(), normal(S, S), normal(H))
        assert_expected_inline(
            specs(report),
            """attention(score=0.25*exp(load(0, h))*s + load(1, q, kv), dead=zero, aux=[float, float])""",
        )

    def test_a_capture_that_is_detached_in_one_place_and_learned_in_another(self):
        assert not scored(lambda s, b, h, q, kv, x: s * x[h].detach() + x[h], normal(H)).fused

    def test_rope_of_latent_attention(self):
        # MLA: a second product, of rotary parts that all heads share, added to the scores.
        def attention(q, k, v, q_rope, k_rope):
            def score(s, b, h, q, kv):
                return s + (q_rope[b, h, q] * k_rope[b, kv]).sum()

            return flex_attention(q, k, v, score)

        ropes = (normal(B, H, S, 4, seed=5).detach(), normal(B, S, 4, seed=6).detach())
        report = check(attention, *(x.detach() for x in qkv()), *ropes, training=False)
        assert_expected_inline(specs(report), """lift: not-pointwise""")

    def test_with_a_mask(self):
        made = block_mask(causal)

        def attention(q, k, v, slopes):
            def score(s, b, h, q, kv):
                return torch.tanh(s / 5) * 5 - slopes[h] * (q - kv)

            return flex_attention(q, k, v, score, made)

        assert_expected_inline(
            specs(check(attention, *qkv(), normal(H))),
            """attention(score=5*tanh(0.05*s) - (q - kv)*load(0, h), mask=kv <= q, dead=zero, aux=[float])""",
        )


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
        AuxRequest = flex.AuxRequest

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
