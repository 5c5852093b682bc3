"""An `AttentionSpec` as the source text of a Hopper CUDA kernel.

The kernel is kernels/sm90/attention_fwd.cuh; what is printed here instantiates it with a tile and
with the variant of `cuda_variant`.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import jinja2

from fa3_compile import resources
from fa3_compile.lower.binaries.remembered import remembered
from fa3_compile.lower.render.cuda_distance import scaling
from fa3_compile.lower.render.cuda_terms import factor_beside, fills_dead_rows, map_kind
from fa3_compile.lower.render.cuda_variant import VariantWriter
from fa3_compile.lower.tiles.config_sm90 import Sm90Config
from fa3_compile.spec import expr as E
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.blocks import may_have_holes


@dataclass(frozen=True)
class CudaKey:
    """Everything that the source text depends on, beside our own sources.

    dtype          "Bf16" or "Fp16"
    dim_qk, dim_v  head dims of Q and K, and of V: multiples of 8
    elements       C++ element type of each captured tensor
    unit           for each captured tensor the axes whose stride is 1
    tile           the captured (q, kv) tensor, of 16 bits or float32, that comes by TMA beside K
    by_distance    scores begin with a table by kv - q, which is made before
    """

    spec: AttentionSpec
    dtype: str
    dim_qk: int
    dim_v: int
    config: Sm90Config
    elements: tuple[str, ...] = ()
    unit: tuple[tuple[int, ...], ...] = ()
    tile: int | None = None
    by_distance: bool = False

    def source(self) -> str:
        """The kernel's text. UnprintableError where C++ has none for an expression."""
        return render(self)

    @property
    def map_kind(self) -> str:
        """As cuda_terms.map_kind. Lists that are made but once may look at each element: intervals
        do not see every hole of a tiled or dilated window. With few queries, whose keys are more
        in every call of a growing cache, they are not made at all."""
        if self.config.block_m > 64 and _may_have_holes(self.spec):
            return "Dense"
        return map_kind(self.spec)

    @property
    def dense(self) -> int:
        """Bytes of an element of the tile, 0 without one."""
        return 0 if self.tile is None else tile_bytes(self.elements[self.tile])

    @property
    def factor(self) -> float:
        """Of Q, where scores may begin with the dense input or a table; else 0."""
        if self.by_distance:
            return scaling(self.spec.score, self.dtype)[1]
        if self.tile is None:
            return 0.0
        tile = next(x for x in E.loads_in(self.spec.score) if x.tensor == self.tile)
        return factor_beside(self.spec.score, tile, self.dtype)

    @property
    def digest(self) -> str:
        """Names the kernel on disk; other sources of ours give another name."""
        rest = (self.dtype, self.dim_qk, self.dim_v, self.config, self.elements, self.unit)
        fields = (str(self.spec), rest, self.tile, self.by_distance, resources.source_hash())
        return hashlib.sha256(repr(fields).encode()).hexdigest()[:24]


def tile_bytes(element: str) -> int:
    """Of an element of a tile, by its C++ type."""
    return 4 if element == "float" else 2


@remembered
def _may_have_holes(spec: AttentionSpec) -> bool:
    return may_have_holes(spec.mask)


def render(key: CudaKey) -> str:
    """The kernel's source. UnprintableError where C++ has no text for an expression."""
    writer = VariantWriter(key, key.factor if key.config.dense_first else 0.0)
    text = template("attention_fwd").render(
        c=key.config,
        dtype=key.dtype,
        dim_qk=key.dim_qk,
        dim_v=key.dim_v,
        aux_fields="\n".join(writer.aux_members()),
        variant="\n".join(writer.variant()),
        block_map=key.map_kind,
        dead_rows=fills_dead_rows(key.spec) != "never",
        by_distance=key.by_distance,
    )
    lines = (line.rstrip() for line in text.splitlines())
    return f"// {key.spec}\n" + "\n".join(lines) + "\n"


@functools.cache
def template(name: str) -> jinja2.Template:
    """One of templates/cuda."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(resources.templates()),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,
    )
    return environment.get_template(f"cuda/{name}.cu.jinja")
