"""Biases of positions: ALiBi, relative tables, and what else models add to their scores."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline

from tests.graph.harness import check, modified, specs
from tests.graph.inputs import (
    INF,
    SCALE,
    B,
    D,
    H,
    S,
    attend,
    distance,
    normal,
    qkv,
    queries_and_keys,
    scores_of,
    uniform,
)

SLOPES = [2 ** (-8 * (h + 1) / H) for h in range(H)]


def test_alibi():
    def by_distance(s):
        return s + torch.tensor(SLOPES).view(H, 1, 1) * distance()

    def by_key(s):
        return s + torch.tensor(SLOPES)[:, None, None] * torch.arange(S)[None, None, :]

    def symmetric(s):
        return s - torch.tensor(SLOPES).view(1, H, 1, 1) * distance().abs()

    def computed_slopes(s):
        slopes = torch.pow(2.0, -8.0 * torch.arange(1, H + 1) / H)
        return s + slopes[:, None, None] * distance()

    assert_expected_inline(
        modified(by_distance), """attention(score=(kv - q)*load(0, h) + 0.25*s, aux=[float])"""
    )
    assert_expected_inline(
        modified(by_key), """attention(score=kv*load(0, h) + 0.25*s, aux=[float])"""
    )
    assert_expected_inline(
        modified(symmetric), """attention(score=0.25*s - abs(kv - q)*load(0, h), aux=[float])"""
    )
    assert_expected_inline(
        modified(computed_slopes), """attention(score=(kv - q)*load(0, h) + 0.25*s, aux=[float])"""
    )


def test_alibi_passed_in_as_bloom_does():
    def attention(q, k, v, alibi):
        flat = alibi.view(B * H, 1, S).baddbmm(
            q.reshape(B * H, S, D), k.reshape(B * H, S, D).transpose(1, 2), beta=1.0, alpha=SCALE
        )
        s = flat.view(B, H, S, S).masked_fill(distance() > 0, torch.finfo(q.dtype).min)
        weights = F.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.bmm(weights.view(B * H, S, S), v.reshape(B * H, S, D)).view(B, H, S, D)

    report = check(attention, *qkv(), uniform(B, H, 1, S))
    assert_expected_inline(
        specs(report),
        """attention(score=where(kv >= q + 1, -3.4028234663852886e+38, load(0, b, h, 0, kv) + 0.25*s), aux=[float])""",
    )


def test_alibi_and_scale_together_as_falcon_does():
    def attention(q, k, v, alibi):
        s = q @ k.mT
        s += alibi
        s *= SCALE
        return attend(s, v)

    assert_expected_inline(
        specs(check(attention, *qkv(), uniform(B, H, 1, S))),
        """attention(score=0.25*load(0, b, h, 0, kv) + 0.25*s, aux=[float])""",
    )


def test_relative_positions_from_a_table():
    def gathered(s, table):
        rows, columns = queries_and_keys()
        return s + table[rows - columns + S - 1].permute(2, 0, 1)

    def embedded(s, table):
        return s + F.embedding(distance() + S - 1, table).permute(2, 0, 1).unsqueeze(0)

    def clipped(s, table):
        return s + table[distance().clamp(-4, 4) + 4].permute(2, 0, 1)

    def of_one_head(s, table):
        return s + table[distance().abs()]

    assert_expected_inline(
        modified(gathered, normal(2 * S - 1, H)),
        """attention(score=load(0, q - kv + 23, h) + 0.25*s, aux=[float])""",
    )
    assert_expected_inline(
        modified(embedded, normal(2 * S - 1, H)),
        """attention(score=load(0, kv - q + 23, h) + 0.25*s, aux=[float])""",
    )
    assert_expected_inline(
        modified(clipped, normal(9, H)),
        """attention(score=load(0, min(4, max(-4, kv - q)) + 4, h) + 0.25*s, aux=[float])""",
    )
    assert_expected_inline(
        modified(of_one_head, normal(S)),
        """attention(score=load(0, abs(kv - q)) + 0.25*s, aux=[float])""",
    )


def t5_bucket(relative):
    """T5's buckets: exact for near keys, logarithmic for far ones."""
    relative = -torch.min(relative, torch.zeros_like(relative))
    near = relative < 4
    far = 4 + (torch.log(relative.float() / 4) / math.log(16 / 4) * 4).to(torch.long)
    return torch.where(near, relative, torch.min(far, torch.full_like(far, 7)))


def test_t5():
    def attention(q, k, v, weight):
        bias = F.embedding(t5_bucket(distance()), weight).permute(2, 0, 1).unsqueeze(0)
        s = q @ k.mT
        s += bias
        return attend(s.float(), v)

    assert_expected_inline(
        specs(check(attention, *qkv(), normal(8, H))),
        """attention(score=load(0, h, kv - q + 23) + s, aux=[float])""",
    )


def test_swin():
    def attention(x, table, shifted):
        c = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij")).flatten(1)
        relative = (c[:, :, None] - c[:, None, :]).permute(1, 2, 0).contiguous() + 2
        place = (relative * torch.tensor([5, 1])).sum(-1)
        q, k, v = x.reshape(8, 9, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
        s = q * SCALE @ k.transpose(-2, -1)
        s = s + table[place.view(-1)].view(9, 9, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        s = (s.view(2, 4, 2, 9, 9) + shifted.unsqueeze(1).unsqueeze(0)).view(-1, 2, 9, 9)
        return attend(s, v).transpose(1, 2).reshape(8, 9, 32)

    shifted = torch.where(uniform(4, 9, 9) > 0.8, -100.0, 0.0)
    report = check(attention, normal(8, 9, 96), normal(25, 2, seed=1), shifted)
    assert_expected_inline(
        specs(report),
        """attention(score=load(0, h, q, kv) + load(1, mod(b, 4), q, kv) + 0.25*s, aux=[float, float], out_order=bqhd)""",
    )


def test_swin_2_adds_its_mask_twice():
    def attention(q, k, v, mask):
        s = scores_of(q, k)
        s = s.view(1, B, H, S, S) + mask.unsqueeze(1).unsqueeze(0)
        s = s + mask.unsqueeze(1).unsqueeze(0)
        return attend(s.view(-1, H, S, S), v)

    mask = torch.where(uniform(B, S, S) > 0.8, -1.0, 0.0)
    assert_expected_inline(
        specs(check(attention, *qkv(), mask)),
        """attention(score=2*load(0, b, q, kv) + 0.25*s, aux=[float])""",
    )


def test_relative_shift_of_transformer_xl():
    # The position term is a product with q of its own, shifted by padding and reshaping.
    def attention(q, k, v, r):
        position = q @ r.mT
        position = F.pad(position, (1, 0)).view(B, H, -1, S)[:, :, 1:].reshape(B, H, S, -1)
        s = (q @ k.mT + position[..., :S]) * SCALE
        return attend(s.masked_fill(distance() > 0, -INF), v)

    assert_expected_inline(
        specs(check(attention, *qkv(), normal(H, S, D))),
        """attention(score=0.25*load(0, b, h, floordiv(kv + 24*q + 24, 25), mod(kv + 24*q + 24, 25)) + 0.25*s, mask=kv <= q, dead=nan, aux=[float])""",
    )


def test_decomposed_positions_of_sam():
    def attention(q, k, v, rows, columns):
        of_q = q.view(B, H, 6, 4, D)
        by_row = torch.einsum("bhxyd,xkd->bhxyk", of_q, rows)
        by_column = torch.einsum("bhxyd,ykd->bhxyk", of_q, columns)
        s = scores_of(q, k).view(B, H, 6, 4, 6, 4)
        s = (s + by_row[..., :, None] + by_column[..., None, :]).view(B, H, S, S)
        return attend(s, v)

    report = check(attention, *qkv(), normal(6, 6, D, seed=5), normal(4, 4, D, seed=6))
    assert_expected_inline(
        specs(report),
        """attention(score=load(0, b, h, floordiv(q, 4), mod(q, 4), floordiv(kv, 4)) + load(1, b, h, floordiv(q, 4), mod(q, 4), mod(kv, 4)) + 0.25*s, aux=[float, float])""",
    )


def test_positions_of_all_but_the_first_token():
    """As MViT's, whose first token has no place in the image: added to a part of the scores."""

    def attention(q, k, v, bias):
        scores = scores_of(q, k)
        scores[..., 1:, 1:] += bias
        return attend(scores, v)

    def moved(q, k, v, bias):
        scores = scores_of(q, k)
        scores[..., 1:, 1:] = scores[..., :-1, :-1] + bias
        return attend(scores, v)

    bias = normal(H, S - 1, S - 1).requires_grad_()
    assert_expected_inline(
        specs(check(attention, *qkv(), bias)),
        """attention(score=where(q >= 1, where(kv >= 1, load(0, h, mod(q - 1, 23), mod(kv - 1, 23)) + 0.25*s, 0.25*s), 0.25*s), aux=[float])""",
    )
    assert specs(check(moved, *qkv(), bias)) == "detect: product-read-twice"


def test_disentangled_terms_of_deberta():
    def attention(q, k, v, position_k, position_q):
        place = (distance() + S - 1).expand(B, H, S, S)
        c2p = torch.gather(q @ position_k.mT, -1, place)
        p2c = torch.gather(k @ position_q.mT, -1, place).mT
        return attend((q @ k.mT + c2p + p2c) * SCALE, v)

    report = check(attention, *qkv(), normal(2 * S - 1, D, seed=5), normal(2 * S - 1, D, seed=6))
    assert_expected_inline(
        specs(report),
        """attention(score=0.25*load(0, b, h, q, kv - q + 23) + 0.25*load(1, b, h, kv, q - kv + 23) + 0.25*s, aux=[float, float])""",
    )


def test_evoformer():
    def attention(q, k, v, pair, mask):
        q, k, v = (t.transpose(-2, -3) for t in (q, k, v))
        s = torch.matmul(q * SCALE, k.transpose(-1, -2)) + mask
        s = s + pair
        return attend(s, v).transpose(-2, -3)

    report = check(
        attention,
        *qkv(2, 3, S, H, D),
        normal(2, 1, H, S, S, seed=5),
        normal(2, 3, 1, 1, S, seed=6),
    )
    assert_expected_inline(
        specs(report),
        """attention(score=load(0, floordiv(b, 3), mod(b, 3), 0, 0, kv) + load(1, floordiv(b, 3), 0, h, q, kv) + 0.25*s, aux=[float, float])""",
    )


def test_bias_of_two_batch_elements_alike():
    def attention(q, k, v, bias):
        return attend(scores_of(q, k) + bias.repeat(2, 1, 1, 1), v)

    assert_expected_inline(
        specs(check(attention, *qkv(), normal(1, H, S, S))),
        """attention(score=load(0, 0, h, q, kv) + 0.25*s, aux=[float])""",
    )


def test_bias_times_gate():
    # MSA with a gate on the bias for each head; both need gradients.
    def attention(q, k, v, bias, gate):
        return attend(scores_of(q, k) + gate.sigmoid().view(H, 1, 1) * bias, v)

    report = check(attention, *qkv(), normal(S, S), normal(H, seed=8))
    assert_expected_inline(
        specs(report), """attention(score=load(0, h)*load(1, q, kv) + 0.25*s, aux=[float, float])"""
    )


def test_factor_for_each_query_and_key():
    def attention(q, k, v, factor):
        return attend(scores_of(q, k) * factor, v)

    assert_expected_inline(
        specs(check(attention, *qkv(), normal(B, 1, S, S))),
        """attention(score=0.25*load(0, b, 0, q, kv)*s, aux=[float])""",
    )
