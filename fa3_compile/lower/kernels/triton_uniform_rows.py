"""What rows without a key add to dQ, dK and dV, by two kernels that end where no row is dead.

By torch (`dead_rows.add_uniform_rows`) these are about twenty passes over tensors of the size of q,
whether there are such rows or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fa3_compile import resources
from fa3_compile.lower.binaries.build import load
from fa3_compile.lower.kernels.triton_launch import Launch, bind_kernel, stride_parameters
from fa3_compile.lower.render.render import render_template
from fa3_compile.lower.render.render_backward import fill_slope
from fa3_compile.lower.tiles.config import TritonConfig
from fa3_compile.spec.attention import AttentionSpec

BLOCK, TILE = 64, 64
CONFIG = TritonConfig(BLOCK, BLOCK, num_warps=4, num_stages=1)


@dataclass(frozen=True)
class UniformKey:
    """The kernels' module, one for all attentions: `spec` is that of the first."""

    spec: AttentionSpec = field(compare=False)

    @property
    def digest(self) -> str:
        """Names the kernels on disk."""
        return f"uniform_rows_{resources.source_hash()[:24]}"

    def source(self) -> str:
        return render_template("uniform_rows.py.jinja", None)


@dataclass(frozen=True)
class UniformRows:
    """Run like a kernel's launch: adds to tensors["dq_ptr"], ["dk_ptr"] and ["dv_ptr"]."""

    sums: Launch
    add: Launch
    heads: int  # KV heads of all batches
    floats: int  # scratch memory of one

    def __call__(self, tensors: Mapping[str, Tensor]) -> None:
        dead = tensors["dead_ptr"]
        scratch = dead.new_empty(self.heads * self.floats, dtype=torch.float32)
        used = {**tensors, "sums_ptr": scratch, "lost_ptr": dead.view(self.heads, -1).amax(-1)}
        self.sums(used)
        self.add(used)


def bind_uniform_rows(spec: AttentionSpec, tensors: Mapping[str, Tensor]) -> UniformRows:
    """For tensors like these, by the names of the kernels' parameters; dead and delta may be any.

    Raises KernelBuildError.
    """
    q, k, v = (tensors[f"{x}_ptr"] for x in "qkv")
    batch, kv_heads, kv_len, dim = k.shape
    v_dim, group = v.shape[3], q.shape[1] // kv_heads
    slope = fill_slope(spec)
    assert slope is not None
    integers = {"KVH": kv_heads, "Sq": q.shape[2], "Skv": kv_len, "D": dim, "DV": v_dim}
    integers |= stride_parameters(tensors)
    constants = {
        "weight": slope / kv_len,
        "GROUP": group,
        "SLOPE": bool(slope),
        # Numbers of 16 bits are numbers of TF32, too.
        "PRECISION": "tf32" if q.element_size() == 2 else "ieee",
        "BLOCK": BLOCK,
        "TILE": TILE,
    }
    some = q.new_empty(1, dtype=torch.float32)
    flag = q.new_empty(1, dtype=torch.int8)
    given = {x: tensors[x] for x in ("q_ptr", "k_ptr", "v_ptr", "dout_ptr")}
    given |= {x: tensors[x] for x in ("dq_ptr", "dk_ptr", "dv_ptr")}
    given |= {"dead_ptr": flag, "lost_ptr": flag, "delta_ptr": some, "sums_ptr": some}
    heads = batch * kv_heads
    tiles = -(-v_dim // TILE) * (-(-dim // TILE) if slope else 1)
    blocks = -(-kv_len // BLOCK) + (group * -(-q.shape[2] // BLOCK) if slope else 0)
    module = load(UniformKey(spec))
    sums, add = (
        bind_kernel(kernel, CONFIG, programs * heads, given, integers, constants)
        for kernel, programs in ((module.uniform_sums, tiles), (module.add_uniform_rows, blocks))
    )
    return UniformRows(sums, add, heads, 2 * v_dim * dim + v_dim + 2 * dim)
