"""Tiles of masks that depend on data: figures from the inputs that `explain` is given."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from fa3_compile.backend import rewritten
from fa3_compile.explaining import explain_with
from fa3_compile.report import RegionReport, Tiles
from tests.graph.inputs import INF, attend, normal, scores_of

LENGTH = 512


def inputs(batch=1):
    return [normal(batch, 1, LENGTH, 4, seed=i).detach() for i in range(3)]


def region_of(function, *args) -> RegionReport:
    [region] = explain_with(rewritten, function, args, {}, None, None).regions
    return region


def masked(q, k, v, seen):
    return attend(scores_of(q, k).masked_fill(~seen, -INF), v)


def tiles_of(function, *args) -> Tiles:
    tiles = region_of(function, *args).tiles
    assert tiles is not None
    return tiles


def test_documents():
    def attention(q, k, v, ids):
        return masked(q, k, v, ids[:, None] == ids[None])

    ids = torch.arange(LENGTH) // 128
    tiles = tiles_of(attention, *inputs(), ids)
    assert str(tiles) == ("12 skipped, 0 masked, 4 full, of 16 (the mask of the first call's data)")
    # Two blocks of 64 of the picture are one of 128.
    assert tiles.picture == tuple("".join("#." [i // 2 != j // 2] for j in range(8)) for i in range(8))  # fmt: skip


def test_padding_of_each_batch_element_beside_a_mask_that_is_known():
    def attention(q, k, v, padding):
        causal = torch.ones(LENGTH, LENGTH).tril().bool()
        return masked(q, k, v, causal & padding[:, None, None].bool())

    padding = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [130]])).long()
    tiles = tiles_of(attention, *inputs(2), padding)
    # The triangle has 6, 4 and 6; beyond key 130 the second has the first column and a strip.
    assert (tiles.empty, tiles.partial, tiles.full) == (6 + 9, 4 + 4, 6 + 3)
    assert tiles.reason == "2 masks of the first call's data"


def test_given_mask():
    seen = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    seen[:128] = True
    tiles = tiles_of(masked, *inputs(), seen)
    assert (tiles.empty, tiles.partial, tiles.full) == (12, 0, 4)


def test_mask_that_is_dear_to_compute_is_not():
    def attention(q, k, v, gate):
        return masked(q, k, v, (k @ gate)[:, :, None, :, 0] > 0)

    assert str(tiles_of(attention, *inputs(), normal(4, 1).detach())) == "known when it runs"


def test_mask_of_a_checkpoint_is_not():
    def attention(q, k, v, seen):
        return checkpoint(masked, q, k, v, seen, use_reentrant=False)

    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    q, k, v = (x.requires_grad_() for x in inputs())
    assert str(tiles_of(attention, q, k, v, seen)) == "known when it runs"


def test_mask_that_is_written_to_is_not():
    def attention(q, k, v, lengths):
        seen = torch.arange(LENGTH) < lengths
        lengths += 1
        return masked(q, k, v, seen[:, None] & (torch.arange(LENGTH) < lengths))

    lengths = torch.tensor([200])
    tiles = tiles_of(attention, *inputs(), lengths)
    assert lengths.item() == 201 and tiles.empty is None
