"""What `cuda_sm90` prints, run on the CPU: every form's hooks, element by element.

The printed variants are compiled by the host's C++ compiler against the kernel's own headers, with
the few CUDA builtins that they use spelled out; captured tensors are passed as the kernel gets
them. Scores, masks, fills and sinks have to be the reference's, and the key blocks of a query
block have to hold what they say.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import sympy
import torch
from torch import Tensor

from fa3_compile import resources
from fa3_compile.lower.choose import Problem
from fa3_compile.lower.kernels.cuda_sm90_keys import keys_of, layout_of, tile_candidate
from fa3_compile.lower.printers.elements import Shape, elements
from fa3_compile.lower.render.cuda_terms import aux_fields, factor_beside, uniform_fill
from fa3_compile.lower.render.render_cuda import render
from fa3_compile.spec.attention import AttentionSpec
from tests.numerics.forms import CAUSAL, FORMS, Form, inputs, shape_for

# What overflows, underflows or cancels where it is not printed as one thing. Two masks that are added
# hide a key by more than float32 has; in the second batch each key is hidden by one or both.
MAX = "3.4028234663852886e38"
TWO = f"where(load(0, b, kv) + load(1, b, kv) - 2 == 0, 0, {MAX}*load(0, b, kv) + {MAX}*load(1, b, kv) - 2*{MAX})"
EXTREMES = [
    Form("two masks, added", f"score=0.1*s + {TWO}", ("seen", "seen too")),
    Form("two masks of elements", f"score=0.1*s + {TWO.replace('(0, b', '(0, q')}", ("far", "seen too")),
    Form("one mask, added", f"score=0.1*s + where(load(0, b, kv) == 1, 0, {MAX}*load(0, b, kv) - {MAX})",
         ("seen",)),
    Form("temperatures out of range", f"score=s*exp(load(0, h)), mask={CAUSAL}", ("temperatures",)),
    Form("a scale below float32's", "score=1e-46*s"),
    Form("a slope under a temperature", "score=s*exp(load(0, h)) + 0.5*(kv - q)", ("temperatures",)),
]  # fmt: skip
ALL = FORMS + EXTREMES

COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

M, N = 64, 32  # the blocks whose occupancy is looked at
LOG2E = 1.4426950408889634
SHIM = """
#include <cmath>
#include <cstring>
#define FA3_DEVICE inline
#define __device__
template <class T> T __ldg(const T* p) { return *p; }
struct int2 { int x, y; };

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }
inline float __int_as_float(int x) { float y; std::memcpy(&y, &x, 4); return y; }
namespace fa3 {
using uint32_t = unsigned; using uint64_t = unsigned long long; using int64_t = long long;
struct Bf16 { unsigned short bits; };
struct Fp16 { unsigned short bits; };
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
inline float inf() { return __int_as_float(0x7f800000); }
inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }
inline float tanh_approx(float x) { return std::tanh(x); }
inline float sigmoid_approx(float x) { return 1.0f / (1.0f + std::exp(-x)); }
inline float max_nan(float x, float y) { return x != x || y != y ? x + y : std::fmax(x, y); }
inline float min_nan(float x, float y) { return x != x || y != y ? x + y : std::fmin(x, y); }
template <class D> float value_of(unsigned short);
template <> inline float value_of<Bf16>(unsigned short x) { return __int_as_float(x << 16); }
template <> inline float value_of<Fp16>(unsigned short x) {
  _Float16 y; std::memcpy(&y, &x, 2); return float(y);
}
}
"""
# Whether the n parts of a sequence are, one behind the other, the sequence.
PARTS = """
extern "C" int parts_agree(int count, int masked, int full, const int* list, int list_end, int n) {
  BlockSequence whole{count, masked, full, 90, list, list_end};
  auto kind = [](const BlockSequence& x, int i) {
    return i < x.masked ? 0 : i < x.masked + x.full ? 1 : 2;
  };
  int at = 0;
  for (int part = 0; part < n; ++part) {
    BlockSequence x = whole.part(part, n);
    if (x.count > count / n + 1) return 0;
    for (int i = 0; i < x.count; ++i, ++at)
      if (x.block(i) != whole.block(at) || kind(x, i) != kind(whole, at)) return 0;
  }
  return at == count;
}
"""
# One call for a form: all elements, and the kind of each block (0 empty, 1 partial, 2 full).
EVALUATE = """
template <class V>
void evaluate(const typename V::Aux* aux, int B, int H, int Sq, int Skv, const float* s,
              const float* tiles, float* score, unsigned char* seen, float* fill, float* sink,
              float* weight, int* kinds) {
  for (int b = 0; b < B; ++b) for (int h = 0; h < H; ++h) {
    typename V::At at{*aux, b, h, Sq, Skv};
    auto head = V::head(at);
    for (int q = 0; q < Sq; ++q) {
      auto row = V::row(at, head, q);
      long long line = (long long)(b * H + h) * Sq + q;
      float shift = V::kShift ? V::shift(at, head, row, q) : 0.0f;
      sink[line] = V::sink(at, head, row, q);
      for (int kv = 0; kv < Skv; ++kv) {
        long long i = line * Skv + kv;
        auto col = V::col(at, head, kv);
        float x = s[i];
        if (V::kAffine) x += V::slope(head) * float(kv - q);
        if (V::kScore) x = V::score(x, at, head, row, col, q, kv, tiles ? tiles[i] : 0.0f);
        float factor = V::scale(head) / kLog2e;
        score[i] = x * factor + shift;
        if (V::kByDistance) score[i] = V::kFactor * factor * s[i] + V::by_distance(at, kv - q);
        seen[i] = sees<V>(at, head, row, col, q, kv);
        fill[i] = V::fill(s[i], at, head, row, col, q, kv);
        weight[i] = weight_of<V>(at, head, row, col, q, kv);
      }
    }
    blocks<V>(at, kinds + (b * H + h) * ceil_div(Sq, kM) * ceil_div(Skv, kN));
  }
}
template <class V>
void blocks(const typename V::At& at, int* kinds) {
  int wide = ceil_div(at.keys, kN);
  for (int m = 0; m < ceil_div(at.queries, kM); ++m) {
    int* line = kinds + m * wide;
    if constexpr (V::kBlockMap) {
      if constexpr (requires { V::kMapValues; }) {
        using Values = Interval<typename V::MapValue>;
        Interval<int> q{m * kM, min(m * kM + kM, at.queries) - 1};
        Values rows[V::kMapValues], keys[V::kMapValues];
        for (int i = 0; i < V::kMapValues; ++i) {
          reset(rows[i]);
          for (int x = q.low; x <= q.high; ++x) include(rows[i], V::map_query(at, i, x));
        }
        for (int n = 0; n < wide; ++n) {
          Interval<int> kv{n * kN, min(n * kN + kN, at.keys) - 1};
          for (int i = 0; i < V::kMapValues; ++i) {
            reset(keys[i]);
            for (int x = kv.low; x <= kv.high; ++x) include(keys[i], V::map_key(at, i, x));
          }
          line[n] = V::classify(at, rows, keys, q, kv);
        }
      } else {
        for (int n = 0; n < wide; ++n) line[n] = kPartial;
      }
    } else {
      auto seq = block_sequence<V, kN>(at, BlockMap{}, m, m * kM, min(m * kM + kM, at.queries));
      for (int n = 0; n < wide; ++n) line[n] = kEmpty;
      for (int i = 0; i < seq.count; ++i) {
        bool left = i >= seq.masked + seq.full;
        bool full = i >= seq.masked && (!left || !V::kLeftBlocks);
        line[seq.block(i)] = full ? kFull : kPartial;
      }
    }
  }
}
"""


def header(name: str) -> str:
    """A kernel header without its includes, PTX and warp intrinsics."""
    text = (resources.kernels() / "include/fa3" / name).read_text()
    text = re.sub(r"#include.*|#pragma once", "", text)
    text = re.sub(r'asm\("ld.global.nc.u16[^;]*;[^;]*;', "bits = *(const unsigned short*)p;", text)
    text = text.replace("return unpack<Dtype>(bits).x;", "return value_of<Dtype>(bits);")
    if name == "block_map_build.cuh":
        start, end = text.index("enum Occupancy"), text.index("// Over a warp;")
        text = "namespace fa3 {\n" + text[start:end] + "}\n"
    return text


def variant(form: Form, dtype=torch.bfloat16):
    """(Aux and Variant of the form's kernel, its tensors)."""
    shape = shape_for(form, 64, 64, 130, 165, 2)
    q, k, v, aux = inputs(form, shape, dtype, "cpu")
    problem = Problem(
        form.spec(),
        dtype,
        torch.device("cuda:0"),
        (9, 0),
        *vars(shape).values(),
        aux_dtypes=tuple(x.dtype for x in aux),
    )
    key = keys_of(problem, layout_of(form.spec(), aux))[0]
    source = render(key)
    return source[source.index("struct alignas(8) Aux") : source.index("using Config")], (
        shape,
        q,
        k,
        aux,
        key,
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("variants")
    headers = ["captured.cuh", "philox.cuh", "variant.cuh", "block_map.cuh", "block_map_build.cuh"]
    parts = [SHIM, *map(header, headers), f"namespace fa3 {{ constexpr int kM = {M}, kN = {N};"]
    parts += ["template <class V> void blocks(const typename V::At&, int*);", EVALUATE]
    for i, form in enumerate(ALL):
        parts.append(f"namespace form{i} {{\n{variant(form)[0]}\n}}")
        parts.append(
            f'extern "C" void form_{i}(const form{i}::Aux* aux, int B, int H, int Sq, int Skv, '
            "const float* s, const float* tiles, float* score, unsigned char* seen, float* fill, "
            "float* sink, float* weight, int* kinds) "
            f"{{ evaluate<form{i}::Variant>(aux, B, H, Sq, Skv, s, tiles, score, seen, fill, sink, "
            "weight, kinds); }"
        )
    (folder / "variants.cc").write_text("\n".join([*parts, PARTS, "}"]))
    assert COMPILER is not None
    command = [COMPILER, "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-ffp-contract=off"]
    command += ["variants.cc", "-o", "variants.so"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    return ctypes.CDLL(str(folder / "variants.so"))


def packed(spec, aux, sizes) -> bytes:
    content = b""
    for x in aux_fields(spec):
        content += {
            "pointer": lambda x: struct.pack("Q", aux[x.index].data_ptr()),
            "stride": lambda x: struct.pack("q", aux[x.index].stride(x.axis)),
            "size": lambda x: struct.pack("i", aux[x.index].shape[x.axis]),
            "number": lambda x: struct.pack("i", sizes[x.index]),
        }[x.kind](x)
    return content + bytes(64)


@pytest.mark.parametrize("form", ALL, ids=lambda x: x.name)
def test_hooks_are_the_reference(form: Form, library) -> None:
    spec = form.spec()
    _, (shape, q, k, aux, key) = variant(form)
    s = torch.matmul(q.float(), k.float().repeat_interleave(shape.heads // shape.kv_heads, 1).mT)
    lengths = tuple(s.shape)
    tiles = None
    exprs = [*spec.expressions[: 2 + (spec.fill is not None) + len(spec.sinks)]]
    weight = sympy.Integer(1) if spec.weight is None else spec.weight
    exprs.append(weight)
    if (load := tile_candidate(spec)) is not None and key.tile is not None:
        exprs.append(load)
    values = elements(exprs, spec, Shape(*lengths), s, aux, form.sizes, torch.float32, s.device)
    if key.tile is not None:
        tiles = values.pop().float().expand(lengths).contiguous()
    score, mask, *rest, factor = values
    got_score, got_fill, got_weight = (torch.empty(lengths) for _ in range(3))
    got_seen, got_sink = torch.empty(lengths, dtype=torch.bool), torch.empty(lengths[:3])
    blocks = (-(-lengths[2] // M), -(-lengths[3] // N))
    kinds = torch.empty(*lengths[:2], *blocks, dtype=torch.int32)
    content = packed(spec, aux, form.sizes)
    getattr(library, f"form_{ALL.index(form)}")(
        content,
        *lengths,
        *(
            ctypes.c_void_p(None if x is None else x.data_ptr())
            for x in (s, tiles, got_score, got_seen, got_fill, got_sink, got_weight, kinds)
        ),
    )
    seen = mask.expand(lengths)
    assert torch.equal(got_seen, seen)
    score = score.float().expand(lengths)
    torch.testing.assert_close(got_score[seen], score[seen], rtol=1e-5, atol=2e-4)
    factor = torch.as_tensor(factor).float().expand(lengths)
    torch.testing.assert_close(got_weight, factor, rtol=1e-6, atol=1e-6)
    if spec.fill is not None and "fill" in render(key):
        fill = rest.pop(0).float().expand(lengths)
        if uniform_fill(spec.fill):
            assert bool((fill == got_fill).all())
        torch.testing.assert_close(got_fill, fill, rtol=1e-5, atol=2e-4)
    if spec.sinks:
        rest = rest[len(rest) - len(spec.sinks) :]
        sink = torch.logsumexp(torch.stack([x.float().expand(*lengths[:3], 1) for x in rest]), 0)
        torch.testing.assert_close(got_sink, sink.squeeze(-1), rtol=1e-5, atol=1e-5)
    check_blocks(kinds, seen, key.map_kind)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16])
@pytest.mark.parametrize(
    "counts", [(0, 0, 0), (1, 1, 0), (9, 2, 7), (9, 2, 4), (9, 0, 9), (12, 12, 0)], ids=str
)
def test_parts_of_a_sequence_are_the_sequence(counts, n: int, library) -> None:
    count, masked, full = counts
    assert library.parts_agree(count, masked, full, None, 0, n)
    if masked + full == count:  # a list has no masked blocks behind its full ones
        blocks = 20
        listed = (ctypes.c_int * blocks)(*range(100, 100 + blocks))
        assert library.parts_agree(count, masked, full, listed, blocks - 1, n)


def check_blocks(kinds: Tensor, seen: Tensor, kind: str) -> None:
    """Empty blocks hold nothing, full ones everything; every empty block is found, and where
    there is a map every full one."""
    padding = (0, kinds.shape[3] * N - seen.shape[3], 0, kinds.shape[2] * M - seen.shape[2])
    shape = (*kinds.shape[:3], M, kinds.shape[3], N)
    some = torch.nn.functional.pad(seen, padding, value=False).view(shape).any(5).any(3)
    every = torch.nn.functional.pad(seen, padding, value=True).view(shape).all(5).all(3)
    assert not bool((some & (kinds == 0)).any())
    # A block past the last key is masked for that, in the kernel or in its map.
    assert not bool((~every & (kinds == 2)).any())
    if kind != "Dense":  # whose elements only a GPU looks at
        assert torch.equal(kinds == 0, ~some)
    if kind == "Interval":
        assert torch.equal(kinds == 2, every)


@pytest.mark.parametrize(
    ("score", "dtype", "factor"),
    [
        ("0.125*s + load(0, b, h, q, kv)", "Bf16", 0.125),
        ("s + load(0, 0, h, q, kv)", "Fp16", 1.0),  # T5
        ("2.0*s + load(0, b, h, q, kv)", "Bf16", 2.0),
        ("2.0*s + load(0, b, h, q, kv)", "Fp16", 0.0),  # Q might become infinite
        ("0.001*s + load(0, b, h, q, kv)", "Fp16", 0.0),  # or lose its digits
        ("-0.125*s + load(0, b, h, q, kv)", "Bf16", 0.0),
        ("0.125*s + 0.5*load(0, b, h, q, kv)", "Bf16", 0.0),
        ("0.125*s + load(0, b, h, q, kv) + 0.01*kv", "Bf16", 0.0),
        ("0.125*s*load(1, h) + load(0, b, h, q, kv)", "Bf16", 0.0),
        ("9.0*tanh(0.1*s) + load(0, b, h, q, kv)", "Bf16", 0.0),
        ("0.125*s*load(0, b, h, q, kv)", "Bf16", 0.0),
    ],
)
def test_which_scores_may_begin_with_a_dense_bias(score, dtype, factor) -> None:
    spec = AttentionSpec.parse(f"attention(score={score}, aux=[float, float])")
    tile = tile_candidate(spec)
    assert tile is not None and factor_beside(spec.score, tile, dtype) == factor


@pytest.mark.parametrize(
    ("scale", "wants_lse", "begins"),
    [(0.125, True, True), (0.125, False, True), (0.1, True, False), (0.1, False, True)],
)
def test_gradients_get_the_lse_of_queries_that_are_not_rounded(scale, wants_lse, begins) -> None:
    spec = AttentionSpec.parse(f"attention(score={scale}*s + load(0, b, h, q, kv), aux=[float])")
    bias = torch.empty(1, 4, 4096, 4096, dtype=torch.bfloat16, device="meta")
    problem = Problem(spec, bias.dtype, torch.device("cuda:0"), (9, 0), 1, 4, 4, 4096, 4096, 128,
                      128, aux_dtypes=(bias.dtype,), wants_lse=wants_lse)  # fmt: skip
    found = keys_of(problem, layout_of(spec, [bias]))
    assert found[0].tile == 0 and any(x.config.dense_first for x in found) == begins
