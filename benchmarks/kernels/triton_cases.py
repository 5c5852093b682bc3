"""The attentions that the benchmarks of the Triton kernels ask for: specs, shapes, inputs."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fa3_compile.lower.choose import Problem
from fa3_compile.spec.attention import AttentionSpec

CAUSAL = "kv - q <= 0"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One attention: spec text, shapes, the tensors it captures and its FlexAttention twin."""

    name: str
    spec: str
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    q_len: int = 333
    kv_len: int = 421
    dim: int = 64
    v_dim: int = 0
    dtype: str = "bf16"
    aux: tuple[str, ...] = ()
    density: float = 1.0
    flex: str = ""

    def parsed(self) -> AttentionSpec:
        return AttentionSpec.parse(self.spec)

    def problem(self) -> Problem:
        capability = torch.cuda.get_device_capability()
        shape = (self.batch, self.heads, self.kv_heads, self.q_len, self.kv_len)
        device = torch.device("cuda", torch.cuda.current_device())
        return Problem(
            self.parsed(), DTYPES[self.dtype], device, capability, *shape, self.dim,
            self.v_dim or self.dim,
        )  # fmt: skip

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        generator = torch.Generator("cuda").manual_seed(0)
        options = {"device": "cuda", "generator": generator}
        dtype, v_dim = DTYPES[self.dtype], self.v_dim or self.dim
        # [B, S, H, D] in memory, as a projection leaves it.
        q = torch.randn(self.batch, self.q_len, self.heads, self.dim, **options)
        k = torch.randn(self.batch, self.kv_len, self.kv_heads, self.dim, **options)
        v = torch.randn(self.batch, self.kv_len, self.kv_heads, v_dim, **options)
        q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
        return q, k, v, [self.captured(x, options) for x in self.aux]

    def captured(self, kind: str, options) -> Tensor:
        b, h, q, kv = self.batch, self.heads, self.q_len, self.kv_len
        if kind == "slopes":
            return torch.exp2(-torch.arange(1, h + 1, device="cuda") * 8.0 / h).view(1, h, 1, 1)
        if kind == "padding":
            lengths = torch.linspace(0.5, 1.0, b, device="cuda") * kv
            return (torch.arange(kv, device="cuda") < lengths[:, None]).view(b, 1, 1, kv)
        if kind == "documents":
            return (torch.arange(max(q, kv), device="cuda") // (max(q, kv) / 8)).long().repeat(b, 1)
        if kind == "bias":
            return torch.randn(1, h, q, kv, **options).to(DTYPES[self.dtype])
        if kind == "masked_bias":
            x = torch.randn(b, 1, q, kv, **options)
            x[:, :, 3] = float("-inf")
            x[:, :, :, : kv // 3] = torch.finfo(torch.float32).min
            return x
        raise ValueError(kind)


def forms(scale: float) -> dict[str, tuple[str, tuple[str, ...]]]:
    """name -> (fields of a spec, captured tensors)."""
    s, cap = f"{scale!r}*s", f"20.0*tanh({scale / 20!r}*s)"
    window = f"({CAUSAL}) & (q - kv <= 50)"
    return {
        "full": (f"score={s}", ()),
        "causal": (f"score={s}, mask={CAUSAL}", ()),
        "bottom_right": (f"score={s}, mask=kv - q - Skv + Sq <= 0", ()),
        "window": (f"score={s}, mask={window}", ()),
        "window_zero": (f"score={s}, mask=({CAUSAL}) & (q - kv <= 50) & (q > 9), dead=zero", ()),
        "window_fill": (
            f"score={s}, mask=({CAUSAL}) & (q - kv <= 50) & (q > 9), dead=score,"
            " fill=-3.4028234663852886e38",
            (),
        ),
        "score_fill": (f"score={s}, mask=kv - q <= -1, dead=score, fill={s} - 10000.0", ()),
        "softcap": (f"score={cap}, mask={CAUSAL}", ()),
        "alibi": (
            f"score={s} + load(0, 0, h, 0, 0)*(kv - q), mask={CAUSAL}, aux=[float]",
            ("slopes",),
        ),
        "alibi_absolute": (
            f"score={s} + load(0, 0, h, 0, 0)*kv, mask={CAUSAL}, aux=[float]",
            ("slopes",),
        ),
        "alibi_abs": (f"score={s} - load(0, 0, h, 0, 0)*abs(q - kv), aux=[float]", ("slopes",)),
        "padding": (
            f"score={s}, mask=load(0, b, 0, 0, kv) != 0, dead=zero, aux=[bool]",
            ("padding",),
        ),
        "documents": (
            f"score={s}, mask=(load(0, b, q) == load(0, b, kv)) & ({CAUSAL}), aux=[int]",
            ("documents",),
        ),
        "bias": (f"score={s} + load(0, 0, h, q, kv), aux=[float]", ("bias",)),
        "masked_bias": (f"score={s} + load(0, b, 0, q, kv), aux=[float]", ("masked_bias",)),
        "prefix": (f"score={s}, mask=({CAUSAL}) | (kv < 100)", ()),
        "sinks": (
            f"score={s}, mask={window}, sinks=[load(0, 0, h, 0, 0)], aux=[float]",
            ("slopes",),
        ),
    }


def check_cases() -> list[Case]:
    """Every form in every dtype at one head dim, full and causal at all of them."""
    cases = []
    dims = {8: 0, 40: 24, 64: 0, 80: 0, 96: 0, 128: 0, 192: 128, 256: 0}
    for n, (form, dtype) in enumerate(itertools.product(forms(0.1), DTYPES)):
        for m, (dim, v_dim) in enumerate(dims.items()):
            if form in ("causal", "softcap") or (n + m) % 4 == 0:
                fields, aux = forms(1 / math.sqrt(dim))[form]
                group = (1, 2, 4)[(n + m) % 3]
                lengths = ((333, 421), (421, 333), (128, 512), (1, 700))[(n + 2 * m) % 4]
                if form == "window_fill":
                    lengths = (333, 421)
                cases.append(
                    Case(
                        form,
                        f"attention({fields})",
                        2,
                        4,
                        4 // group,
                        *lengths,
                        dim,
                        v_dim,
                        dtype,
                        aux,
                    )  # fmt: skip
                )
    return cases


def time_cases() -> list[Case]:
    cases = []
    for dim, heads in ((64, 32), (128, 16), (256, 8)):
        for length in (2048, 16384):
            for name, density in (("full", 1.0), ("causal", 0.5)):
                cases.append(_timed(name, dim, heads, 16384 // length, length, density))
    for dim in (80, 96, 192):
        cases.append(_timed("causal", dim, 16, 2, 4096, 0.5))
    for name, density in (
        ("softcap", 0.5), ("alibi", 0.5), ("window1024", 1024 / 8192 - 0.5 / 64),
        ("padding", 0.75), ("documents8", 1 / 8), ("bias", 1.0), ("prefix1024", 0.5 + 0.5 / 64),
    ):  # fmt: skip
        cases.append(_timed(name, 128, 16, 2, 8192, density))
    for dim in (64, 128, 256):
        cases.append(_timed("causal", dim, 8, 1, 2048, 0.5, "fp32"))
    return cases


def _timed(name, dim, heads, batch, length, density, dtype="bf16") -> Case:
    scale = 1 / math.sqrt(dim)
    fields = dict(forms(scale)) | {
        "window1024": (f"score={scale!r}*s, mask=({CAUSAL}) & (q - kv <= 1023)", ()),
        "prefix1024": (f"score={scale!r}*s, mask=({CAUSAL}) | (kv < 1024)", ()),
        "documents8": (
            f"score={scale!r}*s, mask=load(0, b, q) == load(0, b, kv), aux=[int]",
            ("documents",),
        ),
    }
    text, aux = fields[name]
    return Case(
        name, f"attention({text})", batch, heads, heads, length, length, dim, 0, dtype, aux,
        density, flex=name,
    )  # fmt: skip
