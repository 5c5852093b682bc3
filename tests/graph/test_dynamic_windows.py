"""Lengths that change, of windows and of blocks: what is known to divide them, and what is not."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline

from tests.graph.harness import runs
from tests.graph.inputs import (
    INF,
    SCALE,
    B,
    D,
    H,
    attend,
    normal,
    of_lengths,
    scores_of,
)


def test_windows_of_a_picture_whose_size_changes():
    # Swin: windows folded into the batch, and which of them were shifted together read from a map.
    def windows(x):
        b, h, w, c = x.shape
        x = x.view(b, h // 2, 2, w // 2, 2, c)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)

    def attention(x, region):
        q = k = v = windows(x).unflatten(-1, (2, 8)).transpose(1, 2)
        scores = q @ k.mT * SCALE
        seen = windows(region)[..., 0]
        apart = seen[:, None] != seen[:, :, None]
        scores = scores.view(-1, len(seen), *scores.shape[1:]) - 100.0 * apart[:, None]
        return attend(scores.view(-1, *scores.shape[2:]), v)

    def picture(h, w):
        corner = torch.arange(h)[:, None] + torch.arange(w) > 5
        return normal(B, h, w, 16), corner[None, ..., None]

    inputs = [picture(4, 6), picture(8, 4)]
    [spec] = runs(attention, inputs, training=False).splitlines()
    assert spec.startswith("attention(score=load(0)*s + where(")
    # What is shifted together is read in the picture, as with fixed sizes: n0 windows high, n1 wide.
    assert (
        "load(1, 0, floordiv(q, 2) + 2*mod(floordiv(b, n1), n0), 2*mod(b, n1) + mod(q, 2)" in spec
    )


def test_a_mask_of_whole_blocks():
    # 4 * (n // 4) is n, says the broadcast of mask and scores; 2 * (n // 2) below is not.
    def blocks(q, k, v):
        chosen = (torch.arange(k.size(2) // 4) % 2 == 0).repeat_interleave(4)
        return attend(scores_of(q, k).masked_fill(chosen, -INF), v)

    def halves(q, k, v):
        even = 2 * (k.size(2) // 2)
        return attend(scores_of(q, k)[..., :even], v[:, :, :even])

    assert runs(blocks, of_lengths(24, 16, 40)).startswith("attention(score=load(0)*s, mask=")
    assert runs(halves, of_lengths(17, 23)) == "detect: keys-apart"


def test_windows_of_a_length():
    # Block-local attention: 4 divides each length, a guard says, and the three are equal.
    def attention(q, k, v):
        q, k, v = (x.reshape(B, H, x.size(2) // 4, 4, D) for x in (q, k, v))
        out = torch.einsum("bhwij,bhwjd->bhwid", (q @ k.mT).softmax(-1), v)
        return out.reshape(B, H, -1, D)

    assert (
        runs(attention, of_lengths(12, 16, 24), dynamic=None)
        == "attention(score=s)\nattention(score=s)"
    )


def test_windows_of_a_picture_put_together_again():
    # Swin: the height and the width are known to be even by one guard, of their product.
    def attention(x):
        b, h, w, c = x.shape
        x = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        out = attend(x @ x.mT, x).view(b, h // 2, w // 2, 2, 2, c)
        return out.permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)

    pictures = [(normal(B, h, w, 16),) for h, w in ((4, 6), (6, 10), (8, 4))]
    first, second = runs(attention, pictures, dynamic=None).splitlines()
    assert first.startswith("attention(score=s") and second.startswith("attention(score=s")


def test_a_length_of_windows_is_still_a_length():
    def attention(q, k, v):
        rows, columns = q.size(-2), k.size(-2)
        hidden = torch.ones(rows, columns).triu(columns - rows + 1).bool()
        pooled = k.view(B, H, columns // 4, 4, D).mean(3)
        return attend(scores_of(q, k).masked_fill(hidden, -INF), v) + pooled.sum(2, keepdim=True)

    inputs = [
        (normal(B, H, n, D), normal(B, H, m, D, seed=1), normal(B, H, m, D, seed=2))
        for n, m in ((5, 24), (3, 32), (8, 12))
    ]
    assert_expected_inline(
        runs(attention, inputs, dynamic=None),
        """\
attention(score=0.25*s, mask=kv <= q + 19, dead=nan)
attention(score=0.25*s, mask=kv <= Skv + q - Sq, dead=nan)""",
    )


def test_a_length_that_is_cut_to_whole_windows():
    # Nothing says that 4 divides it: 4 * (n // 4) is another size.
    def attention(q, k, v):
        q, k, v = (x[:, :, : x.size(2) // 4 * 4] for x in (q, k, v))
        q, k, v = (x.reshape(B, H, x.size(2) // 4, 4, D) for x in (q, k, v))
        return attend(q @ k.mT, v).reshape(B, H, -1, D)

    runs(attention, of_lengths(13, 18, 24), dynamic=None)


def test_lengths_whose_halves_lose_as_much():
    # (n // 2) * m = n * (m // 2) holds of odd lengths too.
    def attention(q, k, v):
        n, m = q.size(2), k.size(2)
        torch._check(n // 2 * m == n * (m // 2))
        return attend(scores_of(q, k)[..., : m // 2 * 2], v[:, :, : m // 2 * 2])

    assert runs(attention, of_lengths(17, 23)) == "detect: keys-apart"
