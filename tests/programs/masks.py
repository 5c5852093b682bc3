"""Masks of random attention programs, as programs build them: compared, written, scattered, joined."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BATCH, HEADS = 2, 4


def positions(s: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the queries [n, 1] and of the keys [1, m]."""
    n, m = s.shape[-2:]
    return torch.arange(n, device=s.device)[:, None], torch.arange(m, device=s.device)[None, :]


def _ones(q: Tensor, kv: Tensor, dtype: torch.dtype = torch.bool) -> Tensor:
    return torch.ones(q.shape[0], kv.shape[1], dtype=dtype, device=q.device)


def _blocks(q: Tensor, kv: Tensor) -> Tensor:
    shapes = ((3, 5), (13, 11), (150, 100), (200, 300))
    blocks = torch.block_diag(*(torch.ones(*shape, device=q.device) for shape in shapes))
    return blocks.bool()[: q.shape[0], : kv.shape[1]]


def _by_head(q: Tensor, kv: Tensor) -> Tensor:
    return q - kv < 3 * torch.arange(1, HEADS + 1, device=q.device)[:, None, None]


def _by_slices(q: Tensor, kv: Tensor) -> Tensor:
    seen = _ones(q, kv)
    seen[1:, 2::3] = False
    seen[:, :1] = True
    return seen


def _by_indices(q: Tensor, kv: Tensor) -> Tensor:
    seen, own = _ones(q, kv), torch.arange(min(q.shape[0], kv.shape[1]), device=q.device)
    seen[own, own] = False
    seen[:, torch.tensor([0], device=q.device)] = True
    return seen


def _scattered(q: Tensor, kv: Tensor) -> Tensor:
    seen = torch.zeros_like(_ones(q, kv))
    return seen.scatter_(1, torch.cat((q // 2, q // 3), 1) % kv.shape[1], True)


def _in_place(q: Tensor, kv: Tensor) -> Tensor:
    seen = _ones(q, kv)
    seen &= kv <= q
    seen |= kv < 2
    seen[:, 1:].logical_and_((q - kv[:, 1:]) % 5 != 4)
    return seen


def _joined(q: Tensor, kv: Tensor) -> Tensor:
    half = _ones(q, kv).tril()
    return torch.cat((half[:, :2], half[:, 2:].flip(1)), 1) | (kv == 0)


# name -> (`positions`) -> boolean [.., n, m], True where a key is seen
MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "causal": lambda q, kv: kv <= q,
    "tril": lambda q, kv: _ones(q, kv).tril(),
    "tril float": lambda q, kv: torch.tril(_ones(q, kv, torch.float32)) != 0,
    "bottom right": lambda q, kv: _ones(q, kv).tril(kv.shape[1] - q.shape[0]),
    "window": lambda q, kv: (q - kv).abs() < 4,
    "band": lambda q, kv: (kv <= q) & (q - kv < 5),
    "prefix": lambda q, kv: (kv <= q) | (kv < 3),
    "chunks": lambda q, kv: q // 4 == kv // 4,
    "dilated": lambda q, kv: (q - kv) % 3 == 0,
    "blocks of the length": lambda q, kv: q * 3 // q.shape[0] == kv * 3 // kv.shape[1],
    "window of the length": lambda q, kv: (q - kv).abs() <= kv.shape[1] // 2,
    "half of the length": lambda q, kv: kv < (kv.shape[1] + 1) // 2,
    "slanted": lambda q, kv: kv * q.shape[0] <= q * kv.shape[1],
    "strict": lambda q, kv: kv < q,
    "block": _blocks,
    "first and near": lambda q, kv: (kv == 0) | ((q - kv).abs() <= 2),
    "by head": _by_head,
    "by slices": _by_slices,
    "by indices": _by_indices,
    "scattered": _scattered,
    "in place": _in_place,
    "joined": _joined,
    "counted": lambda q, kv: torch.ones_like(kv).cumsum(1) <= q + 1,
    "index_fill": lambda q, kv: (
        _ones(q, kv).index_fill(1, torch.tensor([1], device=q.device) % kv.shape[1], False)
        | (kv == 0)
    ),
    "bits": lambda q, kv: (q & kv) == 0,
    "other bits": lambda q, kv: (q ^ kv) < 8,
    "packed": lambda q, kv: (((q * 37 + 11) >> (kv % 8)) & 1 != 0) | (kv == 0),
    "not own": lambda q, kv: ~torch.eye(q.shape[0], kv.shape[1], dtype=torch.bool, device=q.device),
}
