"""attention-gym's masks and score modifiers in eager spelling: fused, and as sparse as Flex.

Every mask is written once, as `(b, h, q, kv) -> bool` on tensors. `create_block_mask` turns it
into the blocks that FlexAttention would visit; eager code applies it to the scores with
`masked_fill`, and what the pass reads from there has to leave out at least the same blocks.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from fa3_compile.lower.printers.elements import Shape, elements
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.tiles import EMPTY, FULL, PARTIAL, tile_map
from fa3_compile.testing import assert_matches_eager
from tests.graph.harness import rewrite_only, specs
from tests.graph.inputs import normal

BATCH, HEADS, LENGTH, DIM = 2, 3, 128, 4
BLOCK = 16
WIDTH = 16  # of an image with one token a pixel: 8 rows of 16


def positions() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """b, h, q and kv, which broadcast to [BATCH, HEADS, LENGTH, LENGTH]."""
    return (
        torch.arange(BATCH)[:, None, None, None],
        torch.arange(HEADS)[:, None, None],
        torch.arange(LENGTH)[:, None],
        torch.arange(LENGTH)[None, :],
    )


def causal(b, h, q, kv):
    return q >= kv


def sliding_window(b, h, q, kv, window=40):
    return (q >= kv) & (q - kv <= window)


def symmetric_window(b, h, q, kv, left=20, right=33):
    return (q - kv <= left) & (kv - q <= right)


def prefix_lm(b, h, q, kv, prefix=37):
    return (kv < prefix) | (q >= kv)


def dilated_window(b, h, q, kv, window=24, dilation=4):
    distance = (q - kv).abs()
    return (distance <= window) & (distance % dilation == 0)


def pixels(x: Tensor) -> tuple[Tensor, Tensor]:
    return x // WIDTH, x % WIDTH


def natten(b, h, q, kv, kernel=5):
    """A square of pixels around the query's, shifted inwards at the border of the image."""
    (row, column), (kv_row, kv_column) = pixels(q), pixels(kv)
    row = row.clamp(kernel // 2, LENGTH // WIDTH - 1 - kernel // 2)
    column = column.clamp(kernel // 2, WIDTH - 1 - kernel // 2)
    return ((row - kv_row).abs() <= kernel // 2) & ((column - kv_column).abs() <= kernel // 2)


def tiled_natten(b, h, q, kv, kernel=4, tile=4):
    """The same where the tokens are ordered by tiles of 4 x 4 pixels."""

    def place(x):
        tile_number, inside = x // (tile * tile), x % (tile * tile)
        across = WIDTH // tile
        return (
            tile_number // across * tile + inside // tile,
            tile_number % across * tile + inside % tile,
        )

    (row, column), (kv_row, kv_column) = place(q), place(kv)
    return ((row - kv_row).abs() <= kernel // 2) & ((column - kv_column).abs() <= kernel // 2)


def sliding_tiles(b, h, q, kv, tile=4, kernel=3):
    """STA: windows of whole tiles of a video's frames, here in one dimension of 16 tokens."""
    return (q // (tile * tile) - kv // (tile * tile)).abs() <= kernel // 2


def frames(b, h, q, kv, tokens=24):
    """Video: all of one's own frame and of the frames before."""
    return q // tokens >= kv // tokens


def by_head(b, h, q, kv):
    return (q >= kv) & (q - kv < 16 * (h + 1))


def streaming(b, h, q, kv, sinks=4, window=30):
    return (q >= kv) & ((kv < sinks) | (q - kv <= window))


def dilated_natten(b, h, q, kv, kernel=3, dilation=2):
    """NATTEN among the pixels whose row and column have the query's remainder."""
    (row, column), (kv_row, kv_column) = pixels(q), pixels(kv)
    near = ((row - kv_row).abs() <= dilation * (kernel // 2)) & (
        (column - kv_column).abs() <= dilation * (kernel // 2)
    )
    return (
        near & (row % dilation == kv_row % dilation) & (column % dilation == kv_column % dilation)
    )


def square_tiles(b, h, q, kv, tile=4, kernel=1):
    """STA of an image: windows of whole tiles of 4 x 4 pixels, numbered tile by tile."""
    across = WIDTH // tile
    (row, column), (kv_row, kv_column) = (
        (x // tile**2 // across, x // tile**2 % across) for x in (q, kv)
    )
    return ((row - kv_row).abs() <= kernel) & ((column - kv_column).abs() <= kernel)


def morton(b, h, q, kv, window=2):
    """A square of pixels in Morton order, whose bits are the row's and the column's in turn."""

    def place(x):
        row = sum((x // 2 ** (2 * i + 1)) % 2 * 2**i for i in range(3))
        column = sum((x // 2 ** (2 * i)) % 2 * 2**i for i in range(4))
        return row, column

    (row, column), (kv_row, kv_column) = place(q), place(kv)
    return ((row - kv_row).abs() <= window) & ((column - kv_column).abs() <= window)


def global_tokens(b, h, q, kv, tokens=20, window=18):
    """Longformer: some tokens see all and are seen by all, the others their neighbours."""
    return (q < tokens) | (kv < tokens) | ((q - kv).abs() <= window)


def block_sparse(b, h, q, kv, block=16, stride=3):
    """Sparse transformers: one's own block, and every third before it."""
    return (q >= kv) & ((q // block == kv // block) | (kv // block % stride == stride - 1))


MASKS = {
    f.__name__: f
    for f in (
        causal,
        sliding_window,
        symmetric_window,
        prefix_lm,
        dilated_window,
        natten,
        tiled_natten,
        sliding_tiles,
        frames,
        by_head,
        streaming,
        dilated_natten,
        square_tiles,
        morton,
        global_tokens,
        block_sparse,
    )
}

LENGTHS = torch.tensor([[50, 3, 64, 11], [20, 20, 20, 68]])
DOCUMENTS = torch.stack([torch.arange(4).repeat_interleave(x) for x in LENGTHS])
STARTS = torch.stack([(x.cumsum(0) - x).repeat_interleave(x) for x in LENGTHS])
PADDED = torch.tensor([128, 70])
PREFIXES = torch.tensor([9, 44])


def documents(b, h, q, kv, ids):
    return ids[b, q] == ids[b, kv]


def causal_documents(b, h, q, kv, ids):
    return (ids[b, q] == ids[b, kv]) & (q >= kv)


def inside_documents(b, h, q, kv, ids, starts):
    """As attention-gym composes masks: positions count from the document's start."""
    inside_q, inside_kv = q - starts[b, q], kv - starts[b, kv]
    window = (inside_q >= inside_kv) & (inside_q - inside_kv <= 20)
    return (ids[b, q] == ids[b, kv]) & window


def document_prefixes(b, h, q, kv, ids, starts):
    same = ids[b, q] == ids[b, kv]
    return same & ((kv - starts[b, kv] < 5) | (q >= kv))


def padding(b, h, q, kv, lengths):
    return kv < lengths[b]


def prefixes(b, h, q, kv, lengths):
    return (kv < lengths[b]) | (q >= kv)


# Of each text token: which image it follows (flamingo); of each token: its image (transfusion).
IMAGES = torch.stack([torch.arange(LENGTH) // x for x in (32, 50)])
SPANS = torch.where(torch.arange(LENGTH) % 40 < 25, torch.arange(LENGTH) // 40 + 1, 0)
OFFSETS = torch.tensor([0, 40, 48, 100, 128])


def flamingo(b, h, q, kv, images):
    """Text to image tokens: 32 of each image, those of the last image before the text."""
    return images[b, q] == kv // 32


def transfusion(b, h, q, kv, spans):
    """Causal text, and images whose tokens see one another."""
    return (q >= kv) | ((spans[q] == spans[kv]) & (spans[q] != 0))


def jagged(b, h, q, kv, offsets):
    """Sequences behind one another, by their offsets alone."""

    def sequence(x):
        return (x.unsqueeze(-1) >= offsets[1:]).sum(-1)

    return (sequence(q) == sequence(kv)) & (q >= kv)


# name -> (mask, the tensors that it captures)
MASKS_OF_DATA = {
    "documents": (documents, (DOCUMENTS,)),
    "causal documents": (causal_documents, (DOCUMENTS,)),
    "inside documents": (inside_documents, (DOCUMENTS, STARTS)),
    "documents with prefixes": (document_prefixes, (DOCUMENTS, STARTS)),
    "padding": (padding, (PADDED,)),
    "prefixes": (prefixes, (PREFIXES,)),
    "flamingo": (flamingo, (IMAGES,)),
    "transfusion": (transfusion, (SPANS,)),
    "jagged": (jagged, (OFFSETS,)),
}


def attention(mask, *modifiers):
    """Eager attention of (q, k, v, *captured) under a mask, its scores modified first."""

    def eager(q, k, v, *captured):
        scores = q @ k.mT * DIM**-0.5
        for modifier in modifiers:
            scores = modifier(scores, *positions())
        seen = mask(*positions(), *captured)
        return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v

    return eager


class Captured(TorchDispatchMode):
    """Keeps the tensors that the fused operator is given beside Q, K and V."""

    def __init__(self):
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.fa3.attention.default:
            self.tensors = list(args[3])
        return func(*args, **(kwargs or {}))


def fused(mask, captured=(), *modifiers) -> tuple[AttentionSpec, list[Tensor]]:
    """The spec, and the tensors it captures; the output was compared with eager's."""
    kept = Captured()

    def backend(gm, example_inputs):
        rewrite_only(gm, example_inputs)

        def run(*args):
            with kept:
                return gm(*args)

        return run

    qkv = [normal(BATCH, HEADS, LENGTH, DIM, seed=seed).detach() for seed in (1, 2, 3)]
    report = assert_matches_eager(attention(mask, *modifiers), *qkv, *captured, backend=backend)
    assert len(report.fused) == len(report.regions) == 1, specs(report)
    return AttentionSpec.parse(report.fused[0].spec), kept.tensors


def flex_tiles(mask, captured) -> Tensor:
    """EMPTY, PARTIAL or FULL for each [batch, head, query block, KV block] of Flex's BlockMask."""
    block_mask = create_block_mask(
        lambda b, h, q, kv: mask(b, h, q, kv, *captured),
        BATCH,
        HEADS,
        LENGTH,
        LENGTH,
        device="cpu",
        BLOCK_SIZE=BLOCK,
    )
    tiles = torch.full((BATCH, HEADS, LENGTH // BLOCK, LENGTH // BLOCK), EMPTY)
    for kind, count, indices in (
        (PARTIAL, block_mask.kv_num_blocks, block_mask.kv_indices),
        (FULL, block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
    ):
        assert count is not None and indices is not None
        listed = torch.arange(indices.shape[-1]) < count[..., None]
        tiles.scatter_(-1, indices.long(), kind * listed.long(), reduce="add")
    return tiles


def our_tiles(spec: AttentionSpec, aux: list[Tensor]) -> Tensor:
    """The same of a spec, told what the captured tensors hold."""
    shape, cpu = Shape(BATCH, HEADS, LENGTH, LENGTH), torch.device("cpu")

    def of_head(b: int, h: int) -> Tensor:
        def values(load):
            (found,) = elements([load], spec, shape, None, aux, (), torch.float64, cpu)
            found = found.expand(BATCH, HEADS, *found.shape[-2:])
            return found[b, h].double().numpy()

        tiles = tile_map(spec, LENGTH, LENGTH, BLOCK, BLOCK, head=(b, h), values=values)
        assert tiles is not None
        return torch.from_numpy(tiles)

    rows = [torch.stack([of_head(b, h) for h in range(HEADS)]) for b in range(BATCH)]
    return torch.stack(rows)


def assert_as_sparse(ours: Tensor, flex: Tensor) -> None:
    """No tile that Flex leaves out is visited, and none that it runs unmasked is masked."""
    assert torch.equal(ours, flex)


@pytest.mark.parametrize("name", MASKS)
def test_mask(name):
    assert_as_sparse(our_tiles(*fused(MASKS[name])), flex_tiles(MASKS[name], ()))


@pytest.mark.parametrize("name", MASKS_OF_DATA)
def test_mask_of_data(name):
    mask, captured = MASKS_OF_DATA[name]
    assert_as_sparse(our_tiles(*fused(mask, captured)), flex_tiles(mask, captured))


MODIFIERS = {
    "alibi": lambda s, b, h, q, kv: s + (kv - q) * torch.exp2(-8.0 * (h + 1) / HEADS),
    "softcap": lambda s, b, h, q, kv: 20 * torch.tanh(s / 20),
    "relative": lambda s, b, h, q, kv: s + (q - kv),
    "distance": lambda s, b, h, q, kv: s - 0.1 * (q - kv).abs(),
    "checkerboard": lambda s, b, h, q, kv: torch.where((q - kv) % 2 == 1, s * 0.5, s * 2.0),
    "per head": lambda s, b, h, q, kv: s * (0.5 + h),
    "causal as a score": lambda s, b, h, q, kv: torch.where(q >= kv, s, -float("inf")),
}


@pytest.mark.parametrize("name", MODIFIERS)
def test_score_modifier(name):
    fused(causal, (), MODIFIERS[name])
