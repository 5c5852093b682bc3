"""flex_attention calls, masks and score modifiers as attention-gym has them; numbers of flex's own
eager code in float64, gradients included (which PyTorch refuses on the CPU only for want of a
kernel)."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from torch.nn.attention.flex_attention import (
    and_masks,
    flex_attention,
    or_masks,
)

from fa3_compile.report import Report
from tests.graph.flex import MARKS, block_mask, causal
from tests.graph.harness import check, specs
from tests.graph.inputs import B, H, S, attend, normal, qkv, scores_of

pytestmark = MARKS


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
