"""The parts of a split forward: how many, where they lie, and the kernel that puts them together.

With few queries there are fewer tiles than processors, and each walks over a long cache: its KV
blocks are dealt to several programs (Flash-Decoding).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fa3_compile.lower.binaries.build import load
from fa3_compile.lower.kernels.triton_launch import Launch, bind_kernel
from fa3_compile.lower.render.render import aux_parameters
from fa3_compile.lower.render.render_forward import ForwardKey, part_state
from fa3_compile.lower.tiles.config import TritonConfig

COMBINE = TritonConfig(16, 16, num_warps=4, num_stages=1)


@dataclass(frozen=True)
class Parts:
    """What the programs of a split leave, and its end.

    count    parts of each tile
    rows     of the output, of all batches and heads
    columns  of the output
    states   numbers that a part keeps of a row beside its output
    combine  reads them, and writes the output and the LSE
    """

    count: int
    rows: int
    columns: int
    states: int
    combine: Launch

    @property
    def states_at(self) -> int:
        """Bytes of the outputs, behind which the states lie where both share memory."""
        return 4 * self.count * self.rows * self.columns

    @property
    def bytes(self) -> int:
        return self.states_at + 4 * self.count * self.rows * self.states

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """New memory for them, by the names of the kernels' parameters."""
        empty = functools.partial(torch.empty, dtype=torch.float32, device=device)
        parts = empty(self.count, self.rows, self.columns)
        states = empty(self.states, self.count, self.rows)
        return {"parts_ptr": parts, "states_ptr": states}


def bind_parts(
    key: ForwardKey,
    count: int,
    dead_rows: bool,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    aux: Sequence[Tensor],
    integers: Mapping[str, int],
) -> Parts:
    """Those of a forward with these tensors; `integers` are the parameters that its kernel takes
    beside strides. Raises KernelBuildError."""
    spec, rows = key.spec, q.shape[0] * q.shape[1] * q.shape[2]
    some = lse.new_empty(1)
    tensors = {"q_ptr": q, "parts_ptr": some, "states_ptr": some, "out_ptr": out, "lse_ptr": lse}
    tensors |= {f"aux{x.tensor}": aux[x.tensor] for x in aux_parameters(spec)}
    strides = {f"out_stride_{x}": n for x, n in zip("bhqd", out.stride())}
    combine = bind_kernel(
        load(key).attention_combine, COMBINE, rows, tensors, {**strides, **integers},
        {"DEAD_ROWS": dead_rows},
    )  # fmt: skip
    return Parts(count, rows, out.shape[3], len(part_state(spec)), combine)
