"""Lists of blocks for one layout of an attention: made by a kernel of `render_blocks` each call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fa3_compile.lower.binaries.build import load
from fa3_compile.lower.kernels.triton_launch import Launch, bind_kernel
from fa3_compile.lower.render.render import aux_parameters
from fa3_compile.lower.render.render_blocks import BlocksKey
from fa3_compile.lower.tiles.config import TritonConfig
from fa3_compile.spec import expr as E
from fa3_compile.spec.attention import AttentionSpec


@dataclass(frozen=True)
class Lists:
    """Run like a kernel's launch: leaves new tensors["lists_ptr"] and tensors["counts_ptr"]."""

    launch: Launch
    masks: int
    blocks: int
    others: int

    @property
    def counts_at(self) -> int:
        """Bytes of the lists, behind which the counts lie where both share memory."""
        return 4 * self.masks * self.blocks * 2 * self.others

    @property
    def bytes(self) -> int:
        """Of the lists and the counts."""
        return self.counts_at + 4 * self.masks * self.blocks * 2

    def __call__(self, tensors: dict[str, Tensor]) -> None:
        shape = (self.masks, self.blocks, 2)
        device = tensors["q_ptr"].device
        tensors["lists_ptr"] = torch.empty((*shape, self.others), dtype=torch.int32, device=device)
        tensors["counts_ptr"] = torch.empty(shape, dtype=torch.int32, device=device)
        self.launch(tensors)


def bind_lists(
    spec: AttentionSpec,
    walks: str,
    config: TritonConfig,
    q: Tensor,
    k: Tensor,
    aux: Sequence[Tensor],
    sizes: Sequence[int],
) -> Lists:
    """For blocks of the configuration; `walks` as in BlocksKey. Raises KernelBuildError."""
    symbols = spec.mask.free_symbols
    masks = (q.shape[0] if E.B in symbols else 1) * (q.shape[1] if E.H in symbols else 1)
    blocks, others = -(-q.shape[2] // config.block_q), -(-k.shape[2] // config.block_kv)
    if walks == "q":
        blocks, others = others, blocks
    some = q.new_empty(1, dtype=torch.int32)
    tensors = {"q_ptr": q, "lists_ptr": some, "counts_ptr": some}
    tensors |= {f"aux{i}": x for i, x in enumerate(aux)}
    integers = {"H": q.shape[1], "Sq": q.shape[2], "Skv": k.shape[2]}
    for used in aux_parameters(spec):
        x = aux[used.tensor]
        values = [x.stride(d) for d in used.strides] + [x.shape[d] for d in used.sizes]
        integers |= dict(zip(used.integers, values))
    integers |= {f"n{i}": n for i, n in enumerate(sizes[: spec.size_count])}
    kernel = load(BlocksKey(spec, walks)).block_lists
    tiles = TritonConfig(config.block_q, config.block_kv, num_warps=4, num_stages=1)
    launch = bind_kernel(kernel, tiles, masks * blocks, tensors, integers, {})
    return Lists(launch, masks, blocks, others)
