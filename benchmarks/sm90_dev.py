"""Builds, checks and times tile configs of the Hopper forward kernel, without the front end.

    python benchmarks/sm90_dev.py compile [FILTER]     anywhere: registers, spills, serialisation
    python benchmarks/sm90_dev.py check                on a Hopper GPU: against float64
    python benchmarks/sm90_dev.py bench [FILTER]       on a Hopper GPU: against cuDNN SDPA

Every case is what the front end would print: C++ members of a variant, and the same score and mask
in torch. Full numbers go to $OUT (default: the current directory).
"""

from __future__ import annotations

import csv
import importlib.util
import math
import os
import struct
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import jinja2
import torch

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location(
    "build_nvrtc", ROOT / "fa3_compile/lower/build_nvrtc.py"
)
build_nvrtc = importlib.util.module_from_spec(_spec)
sys.modules["build_nvrtc"] = build_nvrtc
_spec.loader.exec_module(build_nvrtc)


# ---- what is computed ----


@dataclass(frozen=True)
class Case:
    """One score modifier and mask, as C++ and as torch.

    `variant` is C++ with {scale} for the softmax scale; `tensors(b, h, sq, skv)` the captured
    tensors in the order of `aux_fields`; `score(s, b, h, q, kv, tensors)` works on broadcast
    indices, `mask` likewise (None: everything is seen).
    """

    name: str
    variant: str
    aux_fields: str = ""
    tensors: Callable = lambda b, h, sq, skv: ()
    aux: Callable = lambda tensors: b""
    score: Callable = lambda s, b, h, q, kv, t: s
    mask: Callable | None = None
    longest_first: bool = True
    dense: bool = False
    block_map: bool = False
    sink: Callable | None = None
    dead: str = "zero"  # what a row gets that sees no key: zero, nan, or the mean of the values


SCALE = "FA3_DEVICE static float scale(const auto&) { return {scale}f * kLog2e; }\n"
CAUSAL = """\
static constexpr bool kRowEnd = true;
FA3_DEVICE static int row_end(const At& at, const Head&, const Row&, int q) { return q + 1; }
FA3_DEVICE static KeyBounds bounds(const At& at, int q_begin, int q_end) {
  return {0, q_end, 0, q_begin + 1};
}
"""


def causal(q, kv, *_):
    return kv <= q


def pointers(tensors):
    return b"".join(struct.pack("Q", t.data_ptr()) for t in tensors)


CASES = {
    case.name: case
    for case in [
        Case("full", SCALE, longest_first=False),
        Case("expanded", SCALE, longest_first=False),
        Case("causal", SCALE + CAUSAL, mask=lambda b, h, q, kv, t: kv <= q),
        Case(
            "softcap",
            "FA3_DEVICE static float scale(const auto&) { return 50.0f * kLog2e; }\n"
            "static constexpr bool kScore = true;\n"
            "FA3_DEVICE static float score(float s, const At&, const Head&, const Row&, const Col&,"
            " int q, int kv, float) { return tanh_approx({scale}f / 50.0f * s); }\n" + CAUSAL,
            score=lambda s, b, h, q, kv, t: 50 * torch.tanh(s / 50),
            mask=lambda b, h, q, kv, t: kv <= q,
        ),
        Case(
            "alibi",
            SCALE + "struct Head { float slope; };\n"
            "FA3_DEVICE static Head head(const At& at)"
            " { return {__ldg(at.aux.slopes + at.head)}; }\n"
            "static constexpr bool kAffine = true;\n"
            "FA3_DEVICE static float slope(const Head& head) { return head.slope / {scale}f; }\n"
            + CAUSAL,
            aux_fields="const float* slopes;",
            tensors=lambda b, h, sq, skv: (
                2.0 ** (-8.0 * torch.arange(1, h + 1, device="cuda") / h),
            ),
            aux=pointers,
            score=lambda s, b, h, q, kv, t: s + t[0].double()[h] * (kv - q),
            mask=lambda b, h, q, kv, t: kv <= q,
        ),
        Case(
            "window",
            SCALE + "static constexpr bool kRowEnd = true, kRowBegin = true, kLeftBlocks = true;\n"
            "FA3_DEVICE static int row_end(const At&, const Head&, const Row&, int q)"
            " { return q + 1; }\n"
            "FA3_DEVICE static int row_begin(const At&, const Head&, const Row&, int q)"
            " { return q - 1023; }\n"
            "FA3_DEVICE static KeyBounds bounds(const At& at, int q_begin, int q_end) {\n"
            "  return {q_begin - 1023, q_end, q_end - 1 - 1023, q_begin + 1};\n}\n",
            mask=lambda b, h, q, kv, t: (kv <= q) & (q - kv < 1024),
        ),
        Case(
            "prefix",
            SCALE + "static constexpr bool kRowEnd = true;\n"
            "FA3_DEVICE static int row_end(const At&, const Head&, const Row&, int q)"
            " { return max(q + 1, 1024); }\n"
            "FA3_DEVICE static KeyBounds bounds(const At& at, int q_begin, int q_end) {\n"
            "  return {0, max(q_end, 1024), 0, max(q_begin + 1, 1024)};\n}\n",
            mask=lambda b, h, q, kv, t: (kv <= q) | (kv < 1024),
        ),
        Case(
            "bias",
            SCALE + "static constexpr bool kScore = true, kDenseTile = true;\n"
            "FA3_DEVICE static float score(float s, const At&, const Head&, const Row&, const Col&,"
            " int q, int kv, float tile) { return fmaf(tile, 1.0f / {scale}f, s); }\n",
            tensors=lambda b, h, sq, skv: (
                torch.randn(1, h, sq, skv, device="cuda", dtype=torch.bfloat16),
            ),
            score=lambda s, b, h, q, kv, t: s + t[0][0, h, q, kv].to(s.dtype),
            longest_first=False,
            dense=True,
        ),
        Case(
            "sink",
            SCALE + "static constexpr bool kSink = true;\n"
            "FA3_DEVICE static float sink(const At& at, const auto&, int)"
            " { return __ldg(at.aux.sinks + at.head) * kLog2e; }\n" + CAUSAL,
            aux_fields="const float* sinks;",
            tensors=lambda b, h, sq, skv: (torch.randn(h, device="cuda"),),
            aux=pointers,
            mask=lambda b, h, q, kv, t: kv <= q,
            sink=lambda h, t: t[0][h],
        ),
        *(
            Case(
                f"late_{dead}",  # the first queries see no key
                SCALE + f"static constexpr Dead kDead = Dead::{name};\n"
                "static constexpr bool kRowEnd = true;\n"
                "FA3_DEVICE static int row_end(const At&, const auto&, const Row&, int q)"
                " { return q - 99; }\n"
                "FA3_DEVICE static KeyBounds bounds(const At& at, int q_begin, int q_end) {\n"
                "  return {0, q_end - 100, 0, q_begin - 99};\n}\n",
                mask=lambda b, h, q, kv, t: kv <= q - 100,
                dead=dead,
            )
            for dead, name in (("zero", "kZero"), ("nan", "kNan"), ("mean", "kValues"))
        ),
        Case(
            "documents",
            SCALE + "struct Row { int doc; };\nstruct Col { int doc; };\n"
            "static constexpr bool kMask = true, kBlockMap = true;\n"
            "FA3_DEVICE static Row row(const At& at, const Head&, int q)"
            " { return {__ldg(at.aux.doc + at.batch * at.queries + q)}; }\n"
            "FA3_DEVICE static Col col(const At& at, const Head&, int kv)"
            " { return {__ldg(at.aux.doc + at.batch * at.keys + kv)}; }\n"
            "FA3_DEVICE static bool mask(const At&, const Head&, const Row& row, const Col& col,"
            " int q, int kv, float) { return row.doc == col.doc; }\n"
            "static constexpr int kMapValues = 1;\n"
            "FA3_DEVICE static int map_query(const At& at, int, int q)"
            " { return __ldg(at.aux.doc + at.batch * at.queries + q); }\n"
            "FA3_DEVICE static int map_key(const At& at, int, int kv)"
            " { return __ldg(at.aux.doc + at.batch * at.keys + kv); }\n"
            "FA3_DEVICE static int classify(const At&, const Interval* q, const Interval* kv,"
            " Interval, Interval) {\n"
            "  if (q->low > kv->high || kv->low > q->high) return kEmpty;\n"
            "  return q->low == q->high && kv->low == kv->high ? kFull : kPartial;\n}\n",
            aux_fields="const int* doc;",
            tensors=lambda b, h, sq, skv: (documents(b, sq),),
            aux=pointers,
            mask=lambda b, h, q, kv, t: t[0][b, q] == t[0][b, kv],
            block_map=True,
        ),
    ]
}


def documents(batch, length, count=8):
    """int32 [batch, length]: `count` documents with random borders."""
    generator = torch.Generator().manual_seed(length)
    rows = []
    for _ in range(batch):
        cuts = torch.randperm(length - 1, generator=generator)[: count - 1].sort().values + 1
        marks = torch.zeros(length, dtype=torch.int32)
        marks[cuts] = 1
        rows.append(marks.cumsum(0))
    return torch.stack(rows).to("cuda", torch.int32)


def reference(case, q, k, v, tensors, scale, dtype=torch.float64):
    """O [B, H, Sq, Dv] and LSE [B, H, Sq] of `case`, head by head, in `dtype`."""
    batch, heads, queries, _ = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    qi = torch.arange(queries, device=q.device)[:, None]
    ki = torch.arange(keys, device=q.device)[None, :]
    out = torch.empty(*q.shape[:3], v.shape[-1], device=q.device, dtype=dtype)
    lse = torch.empty(q.shape[:3], device=q.device, dtype=dtype)
    for b in range(batch):
        for h in range(heads):
            s = q[b, h].to(dtype) @ k[b, h // group].to(dtype).T * scale
            s = case.score(s, b, h, qi, ki, tensors)
            if case.mask is not None:
                s = s.masked_fill(~case.mask(b, h, qi, ki, tensors), float("-inf"))
            top = s.amax(-1, keepdim=True)
            w = torch.exp(s - torch.where(top.isinf(), torch.zeros_like(top), top))
            total = w.sum(-1, keepdim=True)
            if case.sink is not None:
                total = total + torch.exp(case.sink(h, tensors) - top)
            safe = torch.where(total == 0, torch.ones_like(total), total)
            out[b, h] = (w / safe) @ v[b, h // group].to(dtype)
            lse[b, h] = (top + total.log()).squeeze(-1)
            if case.dead == "mean":
                out[b, h][top.squeeze(-1).isinf()] = v[b, h // group].to(dtype).mean(0)
    return out, lse


# ---- how ----


@dataclass(frozen=True)
class Config:
    """Tile and schedule of one build."""

    block_m: int
    block_n: int
    ping_pong: bool = True
    lazy: bool = True
    longest_first: bool | None = None  # None: as the case has it
    l2_mb: int = 32  # keys and values that a section of the longest-first order may hold
    block_map: bool = False  # set from the case
    defines: tuple[str, ...] = ()  # of an experiment
    dtype: str = "Bf16"
    dim_qk: int = 128
    dim_v: int = 128

    @property
    def name(self):
        flags = ("" if self.ping_pong else " nopp") + ("" if self.lazy else " eager")
        flags += {None: "", True: " lpt", False: " static"}[self.longest_first]
        flags += "".join(f" {name}" for name in self.defines)
        flags += f" l2:{self.l2_mb}" if self.l2_mb != 32 else ""
        return f"{self.block_m}x{self.block_n}{flags}"


_environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(ROOT / "templates"),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
_headers = build_nvrtc.read_headers(ROOT / "kernels")


def source(case: Case, config: Config) -> str:
    if config.longest_first is None:
        config = replace(config, longest_first=case.longest_first)
    config = replace(config, block_map=case.block_map)
    scale = repr(1 / math.sqrt(config.dim_qk))
    defines = "".join(f"#define {name}\n" for name in config.defines)
    return defines + _environment.get_template("cuda/attention_fwd.cu.jinja").render(
        c=config, aux_fields=case.aux_fields, variant=case.variant.replace("{scale}", scale)
    )


def compile_one(key):
    name, config = key
    start = time.perf_counter()
    try:
        built = build_nvrtc.build(source(CASES[name], config), _headers)
    except build_nvrtc.BuildError as error:
        return key, None, str(error), 0.0
    return key, built, "", time.perf_counter() - start


def compile_all(keys, workers):
    with ProcessPoolExecutor(workers) as pool:
        results = list(pool.map(compile_one, dict.fromkeys(keys)))
    for (name, config), built, error, _ in results:
        if built is None:
            print(f"{name} D{config.dim_qk} {config.name}: {error[:1500]}")
        elif not built.healthy:
            print(
                f"{name} D{config.dim_qk}/{config.dim_v} {config.name}: spills "
                f"{built.spill_bytes} B, serialised {built.serialised}"
            )
    slowest = max(seconds for *_, seconds in results)
    print(f"built {len(results)} kernels, slowest {slowest:.2f} s")
    return {key: built for key, built, _, _ in results if built is not None}


def checked(result):
    status, *values = result
    if status.value != 0:
        raise RuntimeError(f"CUDA driver: {status.name}")
    return values[0] if len(values) == 1 else values


class Arguments:
    """A parameter struct in memory, and the array of one pointer that a launch takes."""

    def __init__(self, params: bytes):
        params += bytes(-len(params) % 64)
        self.storage = torch.empty(len(params) + 64, dtype=torch.uint8)
        start = -self.storage.data_ptr() % 64
        self.storage[start : start + len(params)] = torch.frombuffer(
            bytearray(params), dtype=torch.uint8
        )
        self.array = torch.tensor([self.storage.data_ptr() + start], dtype=torch.int64)
        self.pointer = self.array.data_ptr()


@dataclass
class Kernel:
    """A built kernel, loaded; call `prepare` once per set of tensors."""

    case: Case
    config: Config
    built: object
    function: object = field(init=False)
    shared: int = field(init=False)

    def __post_init__(self):
        from cuda.bindings import driver as cu

        torch.cuda.init()
        torch.zeros(1, device="cuda")
        module = checked(cu.cuModuleLoadData(self.built.cubin))
        self.function = checked(cu.cuModuleGetFunction(module, b"attention_fwd"))
        if self.case.block_map:
            self.map_function = checked(cu.cuModuleGetFunction(module, b"block_map"))
        address, size = checked(cu.cuModuleGetGlobal(module, b"shared_bytes"))
        host = bytearray(4)
        checked(cu.cuMemcpyDtoH(host, address, 4))
        self.shared = struct.unpack("i", host)[0]
        attribute = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(cu.cuFuncSetAttribute(self.function, attribute, self.shared))

    def prepare(self, q, k, v, tensors=()):
        """-> (launch(), out, lse). q [B, H, Sq, Dk], k and v [B, Hkv, Skv, D], any strides."""
        from cuda.bindings import driver as cu

        c = self.config
        batch, heads, queries, dim = q.shape
        keys, dim_v = k.shape[2], v.shape[3]
        out = torch.full((batch, heads, queries, dim_v), float("nan"), dtype=q.dtype, device="cuda")
        lse = torch.full((batch, heads, queries), float("nan"), device="cuda")
        maps = [tensor_map(cu, q, c.block_m), tensor_map(cu, k, c.block_n)]
        maps.append(tensor_map(cu, v, c.block_n))
        dense = tensors[0] if self.case.dense else None
        maps.append(bytes(128) if dense is None else tensor_map(cu, dense, c.block_m, dense=True))
        query_blocks = -(-queries // c.block_m)
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        counter = torch.zeros(1, dtype=torch.int32, device="cuda")
        group = heads // k.shape[1]
        kv_bytes = 2 * keys * (dim + dim_v)
        section = max(1, c.l2_mb * 2**20 // max(kv_bytes, 1)) * group
        section = min(section, batch * heads)
        tiles = query_blocks * heads * batch
        grid = min(tiles, processors)
        order = (tiles, query_blocks, heads, section, grid)
        keep = [q, k, v, out, lse, counter, *tensors]
        block_map = (0, 0, 0, 0, 0)
        map_args = None
        if self.case.block_map:
            key_blocks = -(-keys // c.block_n)
            indices = torch.empty(batch, query_blocks, key_blocks, dtype=torch.int32, device="cuda")
            counts = torch.empty(batch, query_blocks, 2, dtype=torch.int32, device="cuda")
            block_map = (indices.data_ptr(), counts.data_ptr(), query_blocks, 0, key_blocks)
            map_params = struct.pack(
                "QQiiiiii", *block_map[:2], batch, 1, query_blocks, key_blocks, queries, keys
            )
            map_args = Arguments(map_params + self.case.aux(tensors))
            keep += [indices, counts]
        dead = 0
        if self.case.dead == "mean":
            keep.append(v.float().mean(2).contiguous())
            dead = keep[-1].data_ptr()
        params = b"".join(maps)
        params += struct.pack("QQQqqq", out.data_ptr(), lse.data_ptr(), dead, *out.stride()[:3])
        params += struct.pack("iiiii4xQ", *order, counter.data_ptr())
        params += struct.pack("QQiii4x", *block_map)
        broadcast = (0, 0) if dense is None else tuple(int(n > 1) for n in dense.shape[:2])
        params += struct.pack("iiiii4x", group, queries, keys, *broadcast)
        params += self.case.aux(tensors)
        args = Arguments(params)
        threads = 128 * (c.block_m // 64 + 1)

        def launch():
            stream = torch.cuda.current_stream().cuda_stream
            if map_args is not None:
                checked(
                    cu.cuLaunchKernel(
                        self.map_function, -(-query_blocks // 8), 1, batch, 256, 1, 1, 0, stream,
                        map_args.pointer, 0,
                    )
                )  # fmt: skip
            checked(
                cu.cuLaunchKernel(
                    self.function, grid, 1, 1, threads, 1, 1, self.shared, stream,
                    args.pointer, 0,
                )
            )  # fmt: skip
            return keep[3]

        return launch, out, lse


def tensor_map(cu, tensor, rows, dense=False):
    """4-D map (d, sequence, head, batch) of `tensor`, boxes of one panel by `rows`."""
    dim = tensor.shape[3]
    panel = 64 if dense or -(-dim // 32) % 2 == 0 else 32
    swizzle = cu.CUtensorMapSwizzle
    dtypes = cu.CUtensorMapDataType
    encoded = checked(
        cu.cuTensorMapEncodeTiled(
            {
                torch.bfloat16: dtypes.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                torch.float16: dtypes.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            }[tensor.dtype],
            4,
            tensor.data_ptr(),
            [cu.cuuint64_t(n) for n in reversed(tensor.shape)],
            [cu.cuuint64_t(n * 2) for n in reversed(tensor.stride()[:3])],
            [cu.cuuint32_t(n) for n in (panel, rows, 1, 1)],
            [cu.cuuint32_t(1)] * 4,
            cu.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle.CU_TENSOR_MAP_SWIZZLE_128B
            if panel == 64
            else swizzle.CU_TENSOR_MAP_SWIZZLE_64B,
            cu.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            cu.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return b"".join(struct.pack("Q", int(word)) for word in encoded.opaque)


# ---- checks ----

# name, dim_qk, dim_v, batch, heads, kv_heads, queries, keys, config
CHECKS = [
    (name, d, dv, b, h, hk, sq, skv, config)
    for name, d, dv, b, h, hk, sq, skv, config in [
        ("full", 128, 128, 2, 4, 4, 1000, 1000, Config(128, 176)),
        ("full", 128, 128, 1, 4, 2, 77, 1391, Config(128, 176, lazy=False)),
        ("full", 64, 64, 2, 6, 3, 1000, 517, Config(192, 128)),
        ("full", 64, 64, 2, 6, 1, 300, 1, Config(192, 128)),
        ("full", 256, 256, 1, 2, 2, 333, 999, Config(128, 80, ping_pong=False)),
        ("full", 40, 40, 1, 3, 3, 333, 999, Config(128, 128)),
        ("full", 80, 80, 1, 3, 3, 333, 999, Config(128, 128)),
        ("full", 96, 96, 1, 3, 3, 333, 999, Config(192, 96)),
        ("full", 8, 8, 1, 3, 3, 333, 999, Config(128, 128)),
        ("full", 192, 128, 1, 3, 3, 333, 999, Config(128, 112)),
        ("full", 192, 192, 1, 3, 3, 333, 999, Config(128, 96)),
        ("full", 104, 120, 1, 3, 3, 333, 999, Config(128, 96)),
        ("causal", 128, 128, 2, 4, 1, 1000, 1000, Config(128, 128)),
        ("causal", 128, 128, 2, 4, 4, 300, 1000, Config(128, 128, lazy=False)),
        ("causal", 128, 128, 2, 4, 4, 1000, 300, Config(128, 128)),
        ("causal", 64, 64, 2, 4, 4, 1000, 1000, Config(192, 128)),
        ("causal", 256, 256, 2, 4, 4, 1000, 1000, Config(128, 80, ping_pong=False)),
        ("causal", 64, 64, 2, 4, 4, 1000, 1000, Config(64, 64)),
        ("softcap", 128, 128, 2, 4, 4, 1000, 1000, Config(128, 128)),
        ("alibi", 128, 128, 2, 4, 4, 1000, 1000, Config(128, 128)),
        ("alibi", 64, 64, 2, 4, 4, 1000, 1000, Config(192, 128)),
        ("window", 128, 128, 1, 2, 2, 3001, 3001, Config(128, 128)),
        ("window", 64, 64, 1, 2, 2, 3001, 3001, Config(192, 128)),
        ("prefix", 128, 128, 1, 2, 2, 3001, 3001, Config(128, 128)),
        ("bias", 128, 128, 2, 4, 4, 1000, 1000, Config(128, 128)),
        ("bias", 64, 64, 2, 4, 4, 512, 256, Config(128, 128)),
        ("causal", 64, 64, 2, 4, 4, 1000, 1000, Config(192, 64)),
        ("causal", 64, 64, 2, 4, 4, 100, 1000, Config(192, 64)),
        ("causal", 64, 64, 2, 4, 4, 1000, 1000, Config(192, 32)),
        ("window", 64, 64, 1, 2, 2, 3001, 3001, Config(192, 64)),
        ("window", 128, 128, 1, 2, 2, 3001, 1000, Config(128, 64)),
        ("window", 64, 64, 1, 2, 2, 3001, 1000, Config(192, 64)),
        ("prefix", 64, 64, 1, 2, 2, 3001, 3001, Config(192, 64)),
        ("full", 128, 128, 2, 4, 4, 1000, 1000, Config(128, 176)),
        ("full", 64, 64, 2, 6, 3, 1000, 517, Config(192, 128)),
        ("full", 256, 256, 2, 8, 2, 133, 999, Config(128, 80, ping_pong=False)),
        ("full", 128, 128, 2, 4, 4, 1000, 1000, Config(192, 80)),
        ("sink", 128, 128, 2, 4, 4, 1000, 1000, Config(128, 128)),
        ("late_zero", 128, 128, 2, 4, 2, 1000, 1000, Config(192, 80)),
        ("late_nan", 128, 128, 2, 4, 2, 1000, 1000, Config(192, 80)),
        ("late_mean", 128, 128, 2, 4, 2, 1000, 1000, Config(192, 80)),
        ("expanded", 128, 128, 2, 4, 4, 500, 1000, Config(192, 80)),
        ("documents", 128, 128, 2, 2, 2, 3001, 3001, Config(128, 128)),
        ("documents", 64, 64, 2, 2, 2, 3001, 3001, Config(192, 96)),
    ]
]


def strided(batch, heads, length, dim, dtype):
    """[B, H, S, D] as a view of [B, S, H, D + 8] with poison beside it."""
    base = torch.full((batch, length, heads, dim + 8), float("nan"), device="cuda", dtype=dtype)
    base[..., :dim] = torch.randn(batch, length, heads, dim, device="cuda").to(dtype)
    return base[..., :dim].transpose(1, 2)


def check(builds):
    worst = 0.0
    for name, d, dv, b, h, hk, sq, skv, config in CHECKS:
        for dtype in ("Bf16", "Fp16"):
            case = CASES[name]
            key = (name, replace(config, dim_qk=d, dim_v=dv, dtype=dtype))
            torch_dtype = {"Bf16": torch.bfloat16, "Fp16": torch.float16}[dtype]
            if key not in builds or (case.dense and dtype == "Fp16"):
                continue
            q = strided(b, h, sq, d, torch_dtype)
            k, v = strided(b, hk, skv, d, torch_dtype), strided(b, hk, skv, dv, torch_dtype)
            if name == "expanded":
                k, v = k[:1, :1].expand_as(k), v[:1, :1].expand_as(v)
            tensors = case.tensors(b, h, sq, skv)
            launch, out, lse = Kernel(case, key[1], builds[key]).prepare(q, k, v, tensors)
            launch()
            torch.cuda.synchronize()
            first = out.clone()
            for _ in range(5):
                out.fill_(float("nan"))
                launch()
            torch.cuda.synchronize()
            stable = torch.equal(first, out)
            want, want_lse = reference(case, q, k, v, tensors, d**-0.5)
            error = ((out.double() - want).norm() / want.norm()).item()
            seen = ~want_lse.isinf()
            lse_error = (lse.double() - want_lse)[seen].abs().max().item()
            masked = bool((lse[~seen] == float("-inf")).all())
            if case.dead == "nan":
                masked &= bool(out[~seen].isnan().all())
                error = ((out.double() - want)[seen].norm() / want.norm()).item()
                stable = True
            elif case.dead == "zero":
                masked &= bool((out[~seen] == 0).all())
            bound = 4e-3 if dtype == "Bf16" else 8e-4
            good = error < bound and lse_error < 5e-3 and masked and stable
            worst = max(worst, error)
            print(
                f"{'ok  ' if good else 'FAIL'} {name} D{d}/{dv} {dtype} {config.name} "
                f"b{b} h{h}/{hk} {sq}x{skv} error {error:.1e} lse {lse_error:.1e} stable {stable}"
            )


# ---- timings ----

TOKENS, WIDTH = 16384, 2048
CANDIDATES = {
    ("full", 64): [Config(192, 128)],
    ("causal", 64): [Config(192, 128)],
    ("full", 128): [Config(192, 80), Config(192, 64), Config(128, 160)],
    ("causal", 128): [Config(192, 80), Config(192, 64), Config(128, 128)],
    ("full", 256): [Config(128, 80), Config(128, 64)],
    ("causal", 256): [Config(128, 80), Config(128, 64)],
    ("softcap", 128): [Config(128, 128), Config(192, 80), Config(192, 80, ping_pong=False)],
    ("alibi", 128): [Config(128, 128), Config(192, 80)],
    ("window", 128): [Config(192, 80), Config(192, 64)],
    ("prefix", 128): [Config(128, 128), Config(192, 80)],
    ("bias", 128): [Config(128, 128), Config(192, 64)],
    ("documents", 128): [Config(128, 128)],
    ("softcap", 64): [Config(192, 128), Config(192, 96)],
    ("alibi", 64): [Config(192, 128)],
    ("full", 96): [Config(192, 96), Config(128, 176), Config(128, 160)],
    ("causal", 96): [Config(192, 96), Config(128, 128)],
    ("full", 80): [Config(192, 112), Config(192, 96), Config(128, 176)],
    ("full", 192): [Config(128, 96), Config(128, 80)],
    ("causal", 192): [Config(128, 96), Config(128, 80)],
    ("full", 160): [Config(128, 96), Config(128, 112), Config(128, 128), Config(192, 64)],
    ("full", 32): [Config(192, 128)],
}  # fmt: skip


def work(case, length, tensors):
    """Multiply-adds that the mask leaves, as a share of all."""
    if case.mask is None:
        return 1.0
    qi = torch.arange(length, device="cuda")
    total = 0
    for rows in qi.split(1024):
        total += case.mask(0, 0, rows[:, None], qi[None, :], tensors).sum().item()
    return total / length**2


def interleaved(functions, rounds):
    """Median milliseconds of each, one call of each in turn."""
    for f in functions:
        f()
        f()
    events = [[] for _ in functions]
    for _ in range(rounds):
        for f, record in zip(functions, events, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            f()
            end.record()
            record.append((start, end))
    torch.cuda.synchronize()
    return [sorted(a.elapsed_time(b) for a, b in record)[len(record) // 2] for record in events]


def busy_clock(f, seconds=0.3):
    """SM clock in MHz and power in W while `f` runs back to back."""
    import pynvml

    pynvml.nvmlInit()
    device = pynvml.nvmlDeviceGetHandleByIndex(0)
    samples = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(20):
            f()
        samples.append(
            (
                pynvml.nvmlDeviceGetClockInfo(device, pynvml.NVML_CLOCK_SM),
                pynvml.nvmlDeviceGetPowerUsage(device) // 1000,
            )
        )
        torch.cuda.synchronize()
    return samples[len(samples) // 2]


def profile(name, dim, length, config):
    """A few launches of one kernel, for ncu."""
    key = (name, replace(config, dim_qk=dim, dim_v=dim))
    _, built, error, _ = compile_one(key)
    if built is None:
        raise SystemExit(error)
    batch, heads = TOKENS // length, WIDTH // dim
    q, k, v = (
        torch.randn(batch, heads, length, dim, device="cuda", dtype=torch.bfloat16)
        for _ in range(3)
    )
    tensors = CASES[name].tensors(batch, heads, length, length)
    launch, *_ = Kernel(CASES[name], key[1], built).prepare(q, k, v, tensors)
    for _ in range(3):
        launch()
    torch.cuda.synchronize()


def bench(builds, wanted):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    rows = []
    for (name, dim), configs in CANDIDATES.items():
        if wanted and not any(part in f"{name}{dim}" for part in wanted.split(",")):
            continue
        case = CASES[name]
        both = name in ("full", "causal") and dim in (64, 128, 256)
        for length in (2048, 16384) if both else (8192,):
            batch, heads = TOKENS // length, WIDTH // dim
            peers = [(name, config) for config in configs]
            shape = (batch, heads, length, dim)
            q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
            tensors = case.tensors(batch, heads, length, length)
            flops = 4 * batch * heads * length**2 * dim * work(case, length, tensors)
            clocks = ""

            def cudnn(q=q, k=k, v=v, is_causal=name != "full"):
                with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                    return torch.nn.functional.scaled_dot_product_attention(
                        q, k, v, is_causal=is_causal
                    )

            functions, names = [cudnn], ["cudnn"]
            if name in ("softcap", "alibi"):
                peers.insert(0, ("causal", CANDIDATES["causal", dim][0]))
            for other, config in peers:
                key = (other, replace(config, dim_qk=dim, dim_v=dim))
                if key in builds:
                    mine = tensors if other == name else ()
                    kernel = Kernel(CASES[other], key[1], builds[key])
                    functions.append(kernel.prepare(q, k, v, mine)[0])
                    names.append(config.name if other == name else f"{other} {config.name}")
            out = functions[-1]()
            if name in ("full", "causal"):
                want = cudnn().float()
                for f, label in zip(functions, names, strict=True):
                    error = ((f().float() - want).norm() / want.norm()).item()
                    if not error < 6e-3:
                        print(f"WRONG {name} D{dim} S{length} {label}: {error}")
            del out
            times = interleaved(functions, 15)
            rates = [flops / t / 1e9 for t in times]
            for label, rate in zip(names, rates, strict=True):
                rows.append((name, dim, length, label, f"{rate:.1f}", f"{rate / rates[0]:.3f}"))
            best = max(rates[1:], default=0)
            cells = "  ".join(f"[{a}] {r:.0f}" for a, r in zip(names, rates, strict=True))
            if len(functions) > 1 and "CLOCKS" in os.environ:
                clocks = " MHz/W " + " ".join(str(busy_clock(f)) for f in functions)
            print(
                f"{name} D{dim} S{length}: best/cudnn {best / rates[0]:.3f}  {cells}{clocks}",
                flush=True,
            )
            del q, k, v, tensors, functions
            torch.cuda.empty_cache()
    with open(Path(os.environ.get("OUT", ".")) / "sm90_dev.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [("case", "dim", "length", "config", "tflops", "to_cudnn"), *rows]
        )


def main():
    mode, wanted = (sys.argv[1:] + [""])[0], (sys.argv[2:] + [""])[0]
    if mode == "profile":  # CASE DIM LENGTH BLOCK_M BLOCK_N
        dim, length, *block = map(int, sys.argv[3:7])
        return profile(wanted, dim, length, Config(*block))
    check_keys = [
        (name, replace(config, dim_qk=d, dim_v=dv, dtype=dtype))
        for name, d, dv, *_, config in CHECKS
        for dtype in ("Bf16", "Fp16")
    ]
    bench_keys = [
        (name, replace(config, dim_qk=dim, dim_v=dim))
        for (name, dim), configs in CANDIDATES.items()
        for config in configs
        if not wanted
        or any(part in f"{name}{dim}" for part in wanted.split(","))
        or name == "causal"
    ]
    workers = int(os.environ.get("WORKERS", str(min(16, os.cpu_count() or 1))))
    keys = {"compile": check_keys + bench_keys, "check": check_keys, "bench": bench_keys}
    keys["all"] = keys["compile"]
    builds = compile_all(keys[mode], workers)
    if mode in ("check", "all"):
        check(builds)
    if mode in ("bench", "all"):
        bench(builds, wanted)


if __name__ == "__main__":
    main()
