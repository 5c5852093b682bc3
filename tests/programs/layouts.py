"""How Q, K and V of random attention programs lie in what they are given, and their two products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.programs.masks import BATCH, HEADS
from tests.programs.parts import Sizes, normal


def layout(name: str, sizes: Sizes, seed: int):
    """(tensors, tensors -> (q, k, v, what is done with the output))."""
    b, h, n, m, d = BATCH, HEADS, sizes.n, sizes.m, sizes.dim

    def leaf(i, *shape):
        return normal(10 * seed + i, *shape, device=sizes.device).requires_grad_()

    def plain(q, k, v):
        return q, k, v, lambda out: out.transpose(1, 2).reshape(b, -1, h * d)

    def as_it_is(q, k, v):
        return q, k, v, lambda out: out

    def four(kv_heads=h):
        return leaf(0, b, h, n, d), leaf(1, b, kv_heads, m, d), leaf(2, b, kv_heads, m, d)

    if name == "bhsd":
        return four(), plain
    if name == "bshd einsum":

        def einsum(q, k, v):
            q, k, v = (torch.einsum("bshd->bhsd", x) for x in (q, k, v))
            return q, k, v, lambda out: torch.einsum("bhsd->bshd", out)

        return (leaf(0, b, n, h, d), leaf(1, b, m, h, d), leaf(2, b, m, h, d)), einsum
    if name == "sbhd":

        def sequence_first(q, k, v):
            q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
            return q, k, v, lambda out: out.permute(2, 0, 1, 3).contiguous()

        return (leaf(0, n, b, h, d), leaf(1, m, b, h, d), leaf(2, m, b, h, d)), sequence_first
    if name == "flat batch":

        def flat(q, k, v):
            q, k, v = (x.reshape(b * h, -1, d) for x in (q, k, v))
            # Scores are [b, h, n, m] again while they are modified.
            return q.view(b, h, -1, d), k.view(b, h, -1, d), v.view(b, h, -1, d), lambda out: out

        return four(), flat
    if name == "fused qkv":

        def fused(x):
            q, k, v = x.view(b, -1, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v, lambda out: out.transpose(1, 2).contiguous().view(b, -1, h * d)

        return (leaf(0, b, n, 3 * h * d),), fused
    if name == "qkv by head":

        def by_head(x):
            q, k, v = x.view(b, -1, h, 3, d).transpose(1, 2).unbind(3)
            return q, k, v, lambda out: out.transpose(1, 2).flatten(2)

        return (leaf(0, b, n, 3 * h * d),), by_head
    if name == "one buffer":

        def parts_of(x):
            return x[:, :, :n], x[:, :, n : n + m], x[:, :, n + m :], lambda out: out

        return (leaf(0, b, h, n + 2 * m, d),), parts_of
    if name == "V is K from the next on":

        def overlapping(q, kv):
            return q, kv[:, :, :-1], kv[:, :, 1:], lambda out: out

        return (leaf(0, b, h, n, d), leaf(1, b, h, m + 1, d)), overlapping
    if name == "Q is K":
        return (leaf(0, b, h, n, d), leaf(1, b, h, m, d)), lambda x, v: (x, x, v, lambda o: o)
    if name == "Q is V":
        return (leaf(0, b, h, n, d), leaf(1, b, h, m, d)), lambda x, k: (x, k, x, lambda o: o)
    if name == "one for all":
        return (leaf(0, b, h, n, d),), lambda x: (x, x, x, lambda o: o)
    if name == "strided":

        def strided(q, k, v):
            return q[..., ::2], k[..., 3 : 3 + d], v[:, :, 1:-1], lambda out: out

        shapes = ((b, h, n, 2 * d), (b, h, m, 2 * d), (b, h, m + 2, d))
        return tuple(leaf(i, *shape) for i, shape in enumerate(shapes)), strided
    if name == "K transposed":

        def transposed(q, k, v):
            return q, k.transpose(-1, -2), v, lambda out: out.flatten(1)

        return (leaf(0, b, h, n, d), leaf(1, b, h, d, m), leaf(2, b, h, m, d)), transposed
    if name == "every other key":

        def every_other(q, k, v):
            return q, k[:, :, ::2], v[:, :, 1::2], lambda out: out

        return (leaf(0, b, h, n, d), leaf(1, b, h, 2 * m, d), leaf(2, b, h, 2 * m, d)), every_other
    if name == "one head expanded":

        def one_head(q, k, v):
            return q, k.expand(b, h, -1, d), v.expand(b, h, -1, d), lambda out: out

        return four(1), one_head
    if name == "heads last":

        def heads_last(q, k, v):
            q, k, v = (x.movedim(-1, 1) for x in (q, k, v))
            return q, k, v, lambda out: out.movedim(1, -1)

        return tuple(leaf(i, b, x, d, h) for i, x in enumerate((n, m, m))), heads_last
    if name == "from the last key on":
        return four(), lambda q, k, v: (q, k.flip(2), v.flip(2), lambda out: out)
    if name == "keys picked":

        def picked(q, k, v):
            at = torch.arange(k.shape[2], device=k.device) // 2
            return q, k[:, :, at], v.index_select(2, at), lambda out: out

        return four(), picked
    if name in ("cache that grows", "cache that is written"):
        old, new = (m // 2, m - m // 2) if name == "cache that grows" else (m, m - m // 2)

        def grown(q, k, v, old_k, old_v):
            return q, torch.cat((old_k, k), 2), torch.cat((old_v, v), 2), lambda out: out

        def written(q, k, v, old_k, old_v):
            old_k, old_v = old_k.clone(), old_v.clone()
            old_k[:, :, -k.shape[2] :] = k
            old_v[:, :, -k.shape[2] :].copy_(v)
            return q, old_k, old_v, lambda out: out

        tensors = leaf(0, b, h, n, d), *(leaf(i, b, h, new, d) for i in (1, 2))
        tensors += tuple(leaf(i, b, h, old, d) for i in (3, 4))
        return tensors, grown if name == "cache that grows" else written
    if name == "windows":
        return tuple(leaf(i, b, 2, h, x, d) for i, x in enumerate((n, m, m))), as_it_is
    if name == "one batch of K":

        def expanded(q, k, v):
            return q, k.expand(b, -1, -1, -1), v.expand(b, -1, -1, -1), lambda out: out

        return (leaf(0, b, h, n, d), leaf(1, 1, h, m, d), leaf(2, 1, h, m, d)), expanded
    if name == "K is V":
        return (leaf(0, b, h, n, d), leaf(1, b, h, m, d)), lambda q, k: (q, k, k, lambda o: o)
    if name == "no batch":
        return (leaf(0, h, n, d), leaf(1, h, m, d), leaf(2, h, m, d)), as_it_is
    if name == "wide V":
        tensors = leaf(0, b, h, n, d), leaf(1, b, h, m, d), leaf(2, b, h, m, 2 * d)
        return tensors, as_it_is
    groups = 1 if name == "mqa" else 2

    def grouped(q, k, v):
        if name == "gqa repeat":
            k, v = (x.repeat_interleave(h // groups, 1) for x in (k, v))
        elif name == "gqa expand":
            k, v = (
                x[:, :, None].expand(b, groups, h // groups, -1, d).reshape(b, h, -1, d)
                for x in (k, v)
            )
        elif name == "gqa tiled":
            k, v = (x.repeat(1, h // groups, 1, 1) for x in (k, v))
        return plain(q, k, v)

    return four(groups), grouped


LAYOUTS = (
    "bhsd",
    "bshd einsum",
    "sbhd",
    "flat batch",
    "fused qkv",
    "qkv by head",
    "one buffer",
    "V is K from the next on",
    "Q is K",
    "Q is V",
    "one for all",
    "strided",
    "K transposed",
    "every other key",
    "one head expanded",
    "windows",
    "one batch of K",
    "K is V",
    "no batch",
    "wide V",
    "heads last",
    "from the last key on",
    "keys picked",
    "cache that grows",
    "cache that is written",
    "gqa repeat",
    "gqa expand",
    "gqa tiled",
    "mqa",
)
# As many queries as keys.
SQUARE = ("fused qkv", "qkv by head", "Q is K", "Q is V", "one for all")


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, -3)


def _batched(left: Tensor, right: Tensor) -> Tensor:
    return torch.bmm(_flat(left), _flat(right)).view(*left.shape[:-1], right.shape[-1])


def _batched_and_added(left: Tensor, right: Tensor) -> Tensor:
    nothing = left.new_empty(1, 1, 1)
    product = torch.baddbmm(nothing, _flat(left), _flat(right), beta=0, alpha=0.5)
    return 2 * product.view(*left.shape[:-1], right.shape[-1])


WRITTEN_OUT = "multiplied and summed"
# [.., n, x] and [.., x, m] -> [.., n, m]
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "operator": lambda left, right: left @ right,
    "function": torch.matmul,
    "einsum": lambda left, right: torch.einsum("...ij,...jk->...ik", left, right),
    "other way": lambda left, right: (right.mT @ left.mT).mT,
    WRITTEN_OUT: lambda left, right: (left[..., None] * right[..., None, :, :]).sum(-2),
    "bmm": _batched,
    "baddbmm": _batched_and_added,
}
# Of operands of the same batches and heads.
BATCHED = ("bmm", "baddbmm")
