"""Tile configurations of the Triton kernels, and the one predicate on what fits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fa3_compile.lower.choose import Problem
from fa3_compile.lower.render.render import padded

# Shared memory that one program may take, in bytes, by compute capability.
SHARED_MEMORY = {
    (8, 0): 166912,
    (8, 6): 101376,
    (8, 7): 166912,
    (8, 9): 101376,
    (9, 0): 232448,
    (10, 0): 232448,
    (12, 0): 101376,
}
# float32 accumulators of one thread; of its 255 registers the rest are addresses and operands.
ACCUMULATORS = 224

# The head dim up to which tables say which tile to take.
WIDEST = 256
# Up to here tiles are fewer than processors, and hold queries of several heads.
FEW_QUERIES = 64


@dataclass(frozen=True)
class TritonConfig:
    """One way to tile an attention. Printed configs can be pasted back.

    block_q, block_kv  queries and keys of a tile: powers of two, at least 16
    num_warps          warps of a program
    num_stages         depth of the software pipeline over KV blocks
    tma                K and V by tensor descriptors (sm_90 and later)
    warp_specialize    loads, products and softmax in warps of their own (sm_100, with tma)
    lazy_rescale       the running maximum is raised, and O scaled, only where a row exceeds it by
                       2^8 (FlashAttention-4's conditional rescaling; not on sm_100)
    packed             a tile's rows are of all query heads that share a KV head
    """

    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int
    tma: bool = False
    warp_specialize: bool = False
    lazy_rescale: bool = False
    packed: bool = False

    def options(self, dtype: torch.dtype) -> dict[str, int]:
        """What Triton is told beside the arguments, for operands of this dtype.

        In half precision products and sums are contracted to FMA, as Triton 3.10 no longer does by
        default: without, the softmax's exponents would take two instructions each. In float32
        they are not (`tl.dot` has its own): scores of hundreds have the digits that eager's have,
        where 200*s - max in one rounding put a row with a near tie three times as far from
        float64 as eager is.
        """
        fused = dtype != torch.float32
        stages = self.num_stages
        return {"num_warps": self.num_warps, "num_stages": stages, "enable_fp_fusion": fused}

    def shared_memory(self, problem: Problem) -> int:
        """Bytes of shared memory, estimated from above: Q, and each stage of K and V."""
        item = problem.dtype.itemsize
        kv = self.block_kv * (padded(problem.dim) + padded(problem.v_dim))
        p = self.block_q * self.block_kv if item == 4 else 0
        return item * (self.block_q * padded(problem.dim) + max(1, self.num_stages) * kv + p)

    def accumulators(self, problem: Problem) -> int:
        """float32 values of the scores and the output that each thread holds."""
        return self.block_q * (self.block_kv + padded(problem.v_dim)) // (32 * self.num_warps)

    def fits(self, problem: Problem, capability: tuple[int, int]) -> bool:
        """Whether the tile can be expected to build without spills."""
        arch = nearest_arch(capability)
        if self.tma and (arch < (9, 0) or not takes_descriptors(problem)):
            return False
        # On sm_90 Triton 3.6's warp specialisation pass fails on this kernel.
        if self.warp_specialize and not (self.tma and arch[0] >= 10):
            return False
        # A branch around an accumulator in tensor memory: Triton 3.7's layout pass fails on it,
        # 3.9 builds it without spills, but not with warp_specialize.
        if self.lazy_rescale and arch[0] == 10:
            return False
        if self.shared_memory(problem) > SHARED_MEMORY[arch]:
            return False
        # On sm_100 the products accumulate in tensor memory.
        return arch == (10, 0) or self.accumulators(problem) <= ACCUMULATORS

    def for_rows(self, count: int, most_warps: int = 4) -> TritonConfig:
        """The same for few rows: no more than there are, rounded up."""
        rows = max(16, 1 << max(count - 1, 0).bit_length())
        if rows >= self.block_q:
            return self
        warps = min(self.num_warps, most_warps)
        return replace(self, block_q=rows, num_warps=warps, tma=False, warp_specialize=False)


def nearest_arch(capability: tuple[int, int]) -> tuple[int, int]:
    """The architecture of SHARED_MEMORY that a device is treated as."""
    if capability in SHARED_MEMORY:
        return capability
    return max((x for x in SHARED_MEMORY if x <= capability), default=(8, 0))


def takes_descriptors(problem: Problem) -> bool:
    """Whether rows of K and V are multiples of 16 bytes, as tensor descriptors need."""
    item = problem.dtype.itemsize
    return item == 2 and problem.dim * item % 16 == 0 and problem.v_dim * item % 16 == 0


def is_wide(problem: Problem) -> bool:
    """Whether a head is wider than the tables of tiles go."""
    return max(problem.dim, problem.v_dim) > WIDEST


def head_class(problem: Problem) -> int:
    """The column of the shipped table: the wider head dim, rounded up."""
    width = max(padded(problem.dim), padded(problem.v_dim))
    return next(x for x in (64, 96, 128, 192, 256) if width <= x)


def bits(dtype: torch.dtype) -> int:
    """16 or 32: bf16 and fp16 share their configurations."""
    return 8 * dtype.itemsize
