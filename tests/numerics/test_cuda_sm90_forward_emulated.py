"""The forward of `cuda_sm90` on the CPU, as test_cuda_sm90_backward_emulated.py runs its backward:
kernels, launches and parameters, against the reference; and which key blocks are listed."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fa3_compile import resources
from fa3_compile.lower.binaries.build_nvrtc import Built
from fa3_compile.lower.choose import Problem
from fa3_compile.lower.kernels import (
    cuda_sm90,
    cuda_sm90_forward_parameters,
    cuda_sm90_lists,
    cuda_sm90_parameters,
)
from fa3_compile.lower.kernels.cuda_sm90_keys import keys_of, layout_of
from fa3_compile.lower.kernels.cuda_sm90_lists import kept_lists
from fa3_compile.lower.kernels.cuda_sm90_parameters import ListShape
from fa3_compile.lower.render.render_cuda import CudaKey
from fa3_compile.lower.tiles.config_sm90 import Sm90Config
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.tiles import EMPTY, FULL, PARTIAL, tile_map
from tests.graph import test_attention_gym as gym
from tests.host_driver import kernels_of, launches, on_device, on_host, shared_library
from tests.numerics.forms import BY_NAME, Shape, compare, inputs
from tests.numerics.test_cuda_sm90_backward_emulated import ENTRY, HEADERS, between, header
from tests.numerics.test_cuda_variants import EXTREMES

__all__ = ["launches"]

FORWARD_HEADERS = (
    "softmax", "finish_row", "distance_table", "dense_tile", "forward_block", "forward_epilogue", "forward_weigher",
    "forward_consumer", "forward_producer", "attention_fwd",
)  # fmt: skip
# Warpgroups take turns for speed alone.
NO_TURNS = """namespace fa3 { template <int, bool> struct PingPong {
  static void start(int) {} static void wait(int) {} static void pass(int) {} }; }"""


def compiled(key: CudaKey, to: Path) -> Path:
    """A library of a key's kernels."""
    source = key.source()
    own = between(source, "struct alignas(8) Aux", "}  // namespace fa3")
    emulated = resources.kernels().parent / "tests/numerics/emulated_sm90.hpp"
    parts = [f'#define DTYPE {key.dtype}\n#include "{emulated}"', NO_TURNS]
    parts += [header(x) for x in HEADERS if not x.startswith(("query", "backward"))]
    parts += [header(x) for x in FORWARD_HEADERS]
    parts += ["namespace fa3 {", own, "}", "using namespace fa3;"]
    parts += [ENTRY.format(name="attention_fwd", kernel="Kernel")]
    if key.map_kind:
        parts += [re.sub("fa3::", "", between(source, "using BlockMapKernel", 'extern "C"'))]
        parts += [ENTRY.format(name="block_map", kernel="BlockMapKernel")]
    if key.by_distance:
        parts += [re.sub("fa3::", "", between(source, "using DistanceTableKernel", 'extern "C"'))]
        parts += [ENTRY.format(name="distance_table", kernel="DistanceTableKernel")]
    if "using DeadRowsKernel" in source:
        parts += [header("dead_rows"), "using DeadRowsKernel = DeadRows<Config, Variant>;"]
        parts += [ENTRY.format(name="dead_rows", kernel="DeadRowsKernel")]
    parts += ['extern "C" { int shared_bytes = Kernel::kSharedBytes, counters[256]; }']
    return shared_library("\n".join(parts), to)


LATE = {"optimistic": True}
AHEAD = LATE | {"ahead": 32}
FIRST = LATE | {"held_queries": True, "dense_first": True}
NAMED = BY_NAME | {x.name: x for x in EXTREMES}
# (form, head dims, lengths, query heads of a KV head, tile)
CASES = [
    ("causal", (64, 64), (300, 300), 1, {"block_m": 192, "block_n": 48} | AHEAD),
    ("window, nan", (32, 32), (420, 210), 1, {"block_m": 192, "block_n": 16} | LATE),
    ("documents", (64, 64), (300, 300), 2, {}),
    ("dense bias with -inf", (64, 64), (150, 136), 1, {}),
    ("dense bias, one batch", (32, 32), (200, 72), 2, {"longest_first": False}),
    ("dense bias", (32, 32), (100, 200), 1, {"block_n": 80} | AHEAD),
    ("dense bias with -inf", (64, 64), (150, 136), 1, FIRST),
    ("dense bias, one batch", (64, 64), (130, 160), 2, {"block_n": 48} | FIRST),
    ("dense bias, fp32", (64, 64), (150, 136), 1, {}),
    ("dense bias, fp32", (32, 32), (100, 200), 2, {"block_n": 96} | AHEAD),
    ("dense bias, fp32", (64, 64), (130, 160), 2, {"block_n": 64} | FIRST),
    ("relative bias", (64, 64), (150, 136), 1, FIRST),
    ("relative bias, a table", (64, 64), (270, 330), 2, {"block_n": 80} | FIRST | AHEAD),
    ("relative bias, a table, causal", (64, 64), (200, 136), 1, {"block_n": 48} | FIRST),
    ("relative bias, fills", (64, 64), (150, 136), 1, FIRST),
    ("relative bias of a curve", (64, 64), (70, 150), 1, {"block_n": 64} | FIRST),
    ("documents", (128, 128), (200, 200), 2, {"held_queries": True} | AHEAD),
    ("alibi both sides", (32, 32), (130, 200), 2, {"block_n": 32} | AHEAD),
    ("sink", (32, 32), (70, 70), 1, {"block_n": 16} | LATE),
    ("sink of each row, filled", (32, 40), (90, 60), 1, {"block_n": 16}),
    ("dropout, causal", (32, 32), (70, 70), 1, {"block_n": 16} | LATE),
    ("temperatures out of range", (32, 32), (70, 70), 1, {"block_n": 16} | LATE),
    ("two masks, added", (32, 32), (70, 70), 1, {}),
]


def ran(problem, key, inputs, sizes, to, monkeypatch) -> tuple[Tensor, Tensor]:
    """What the kernel of a key makes of (q, k, v, aux)."""
    built = Built(bytes(compiled(key, to / "kernels.so")) + b"\0", "", 168, 0, False)
    monkeypatch.setattr(cuda_sm90, "load_first", lambda keys, **_: (keys[0], built))
    monkeypatch.setattr(cuda_sm90_forward_parameters, "processors", lambda device: 2)
    monkeypatch.setattr(cuda_sm90_parameters, "SECTION_BYTES", 1)  # of a head or a group
    q, k, v, aux = on_device(inputs)
    return on_host(cuda_sm90.bind(problem, q, k, v, aux, sizes, key)(q, k, v, aux))


@pytest.mark.parametrize("case", CASES, ids=lambda x: x[0])
def test_attention(case, tmp_path, monkeypatch, launches) -> None:
    name, dims, lengths, group, tile = case
    form = NAMED[name]
    (q_len, kv_len), (dim, v_dim) = lengths, dims
    spec, shape = form.spec(), Shape(2, 2, 2 // group, q_len, kv_len, dim, v_dim)
    q, k, v, aux = inputs(form, shape, torch.bfloat16, "cpu")
    problem = Problem(spec, q.dtype, torch.device("cuda:0"), (9, 0), *vars(shape).values(),
                      aux_dtypes=tuple(x.dtype for x in aux))  # fmt: skip
    key = keys_of(problem, layout_of(spec, aux))[0]
    key = replace(key, config=replace(key.config, **{"split": False, "longest_first": True} | tile))
    out, lse = ran(problem, key, (q, k, v, aux), form.sizes, tmp_path, monkeypatch)
    assert compare(form, out, lse, q, k, v, aux) is None


@pytest.mark.parametrize("padded", [0, 20])
def test_rows_without_a_key_are_looked_for_once(padded, tmp_path, monkeypatch, launches) -> None:
    """Calls that share their lists go without it where the first found none."""
    form = BY_NAME["left padding"]
    q, k, v, (keep,) = inputs(form, Shape(1, 2, 1, 70, 70, 32, 32), torch.bfloat16, "cpu")
    keep[:] = torch.arange(70) >= padded
    problem = Problem(form.spec(), q.dtype, torch.device("cuda:0"), (9, 0), 1, 2, 1, 70, 70, 32, 32,
                      aux_dtypes=(keep.dtype,))  # fmt: skip
    key = keys_of(problem, layout_of(form.spec(), [keep]))[0]
    key = replace(key, config=Sm90Config(128, 16))
    built = Built(bytes(compiled(key, tmp_path / "kernels.so")) + b"\0", "", 168, 0, False)
    monkeypatch.setattr(cuda_sm90, "load_first", lambda keys, **_: (keys[0], built))
    q, k, v, aux = on_device((q, k, v, [keep]))
    call, shared = cuda_sm90.bind(problem, q, k, v, aux, (), key).fixed(None), []
    for _ in range(3):
        out, lse = on_host(call(q, k, v, aux, (), shared))
        assert compare(form, out, lse, *on_host((q, k, v, aux))) is None
    both = "attention_fwd dead_rows "
    expected = both * 3 if padded else both + "attention_fwd " * 2
    assert [x.name for x in launches] == f"block_map {expected}".split()


# What a bias adds in a row, from the keys that are worked last to those that are first.
HARD_ROWS = {
    "steeper than a maximum lasts": lambda n: torch.linspace(900, 0, n),
    "one large one, worked last": lambda n: torch.eye(n)[0] * 30000,
    "a maximum nothing comes near again": lambda n: torch.eye(n)[-1] * 30000,
    "nothing seen at first": lambda n: torch.full((n,), -inf).where(torch.arange(n) > n // 4, 0.0),
    "nothing seen": lambda n: torch.full((n,), -inf),
    "far below 0": lambda n: torch.full((n,), -10000.0),
    "the least number": lambda n: torch.full((n,), -65504.0),
    "infinity": lambda n: torch.where(torch.arange(n) == n // 2, inf, 0.0),
    "NaN": lambda n: torch.where(torch.arange(n) == n // 2, nan, 0.0),
    "just within what is taken": lambda n: torch.where(torch.arange(n) < n // 2, 4.5, 0.0),
}


BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [({}, BF16), (LATE, BF16), (AHEAD, FP16), (FIRST, BF16), (AHEAD | FIRST, FP16)],
)
def test_maxima_that_come_late(changes, dtype, tmp_path, monkeypatch, launches) -> None:
    """Softmax as in float64 whatever a row's scores are, those of its other rows beside it."""
    kv_len, dim = 192, 64
    spec = AttentionSpec.parse("attention(score=0.2*s + load(0, 0, 0, q, kv), aux=[float])")
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([f(kv_len) for f in HARD_ROWS.values()]).repeat(8, 1)
    q, k, v = (
        torch.randn(1, 1, n, dim, generator=generator).to(dtype)
        for n in (len(rows), kv_len, kv_len)
    )
    bias = rows[None, None].to(dtype)
    problem = Problem(spec, dtype, torch.device("cuda:0"), (9, 0), 1, 1, 1, len(rows), kv_len, dim,
                      dim, aux_dtypes=(dtype,))  # fmt: skip
    key = keys_of(problem, layout_of(spec, [bias]))[0]
    key = replace(key, config=Sm90Config(128, 64, longest_first=False, **changes))
    out, lse = ran(problem, key, (q, k, v, [bias]), (), tmp_path, monkeypatch)
    scores = 0.2 * q.double() @ k.double().mT + bias.double()
    expected = torch.softmax(scores, -1) @ v.double()
    torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02, equal_nan=True)
    finite = expected.isfinite().all(-1)
    rounding = torch.finfo(dtype).eps if "dense_first" in changes else 0.0  # of Q times 0.2
    torch.testing.assert_close(
        lse[finite].double(), scores.logsumexp(-1)[finite], rtol=1e-4, atol=max(1e-3, rounding)
    )


def test_rows_of_one_fill_of_a_table(tmp_path, monkeypatch, launches) -> None:
    """Their LSE is the fill itself, from which gradients take the score, whatever the scale is."""
    spec = AttentionSpec.parse("attention(score=0.1*s + load(0, h, kv - q + 69), aux=[float])")
    fills = torch.tensor([torch.finfo(x).min for x in (BF16, torch.float32)] + [-1e9, -6e8])
    table = fills[:, None].expand(4, 99)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, n, 64, generator=generator).to(BF16) for n in (70, 30, 30))
    problem = Problem(spec, BF16, torch.device("cuda:0"), (9, 0), 1, 4, 4, 70, 30, 64, 64,
                      aux_dtypes=(table.dtype,))  # fmt: skip
    key = keys_of(problem, layout_of(spec, [table]))[0]
    assert key.by_distance
    key = replace(key, config=replace(key.config, block_n=32))
    out, lse = ran(problem, key, (q, k, v, [table]), (), tmp_path, monkeypatch)
    assert [x.name for x in launches] == ["distance_table", "attention_fwd"]
    assert torch.equal(lse[0], fills[:, None].expand(4, 70))
    mean = v.float().mean(2, keepdim=True).expand(out.shape)
    torch.testing.assert_close(out.float(), mean, rtol=0.01, atol=0.01)


def lister(key: CudaKey, to: Path) -> Path:
    """A library of the kernel that lists key blocks."""
    source = key.source()
    own = between(source, "struct alignas(8) Aux", "using Config")
    emulated = resources.kernels().parent / "tests/numerics/emulated_sm90.hpp"
    parts = [f'#define DTYPE {key.dtype}\n#include "{emulated}"']
    parts += [header(x) for x in ("captured", "philox", "variant", "block_map", "block_map_build")]
    config = f"struct Config {{ static constexpr int kBlockN = {key.config.block_n}; }};"
    parts += ["namespace fa3 {", own, config, "}", "using namespace fa3;"]
    parts += [re.sub("fa3::", "", between(source, "using BlockMapKernel", 'extern "C"'))]
    parts += [ENTRY.format(name="block_map", kernel="BlockMapKernel")]
    parts += ['extern "C" void attention_fwd(const void*, unsigned, unsigned, unsigned, int) {}']
    parts += ['extern "C" { int shared_bytes = 1024, counters[256]; }']
    return shared_library("\n".join(parts), to, "-O0")


def listed(shape: ListShape, address: int) -> np.ndarray:
    """EMPTY, PARTIAL or FULL for each [batch, head, list, block] of kept lists."""
    words = (ctypes.c_int * (shape.bytes // 4)).from_address(address)
    blocks = shape.blocks
    counts = np.array(words[: 2 * shape.count]).reshape(-1, 2)
    lists = np.array(words[shape.indices // 4 :]).reshape(-1, blocks)
    found = np.full(lists.shape, EMPTY)
    for row, (partial, full) in enumerate(counts):
        found[row, lists[row, :partial]] = PARTIAL
        found[row, lists[row, blocks - full :]] = FULL
    return found.reshape(shape.batches, shape.heads, shape.lists, blocks)


# Masks whose rows see keys with holes between them, of tests/graph/test_attention_gym.py.
HOLES = ("tiled_natten", "streaming", "dilated_natten", "square_tiles")


@pytest.mark.parametrize("name", HOLES)
def test_visited_blocks_are_those_of_the_report(name, tmp_path, monkeypatch, launches) -> None:
    """And they are listed once for all calls."""
    monkeypatch.setattr(gym, "LENGTH", length := 512)
    monkeypatch.setattr(gym, "WIDTH", 32)
    spec = AttentionSpec.parse(str(gym.fused(gym.MASKS[name])[0]))
    q, k, v = on_device([torch.zeros(1, 2, length, 64, dtype=torch.bfloat16)] * 3)
    problem = Problem(spec, q.dtype, q.device, (9, 0), 1, 2, 2, length, length, 64, 64)
    key = keys_of(problem, layout_of(spec, []))[0]
    key = replace(key, config=replace(key.config, block_m=128, block_n=16))
    built = Built(bytes(lister(key, tmp_path / "kernels.so")) + b"\0", "", 168, 0, False)
    monkeypatch.setattr(cuda_sm90, "load_first", lambda keys, **_: (keys[0], built))
    monkeypatch.setattr(cuda_sm90_lists, "_kept", {})
    seen = []
    monkeypatch.setattr(cuda_sm90, "kept_lists", lambda p, i: seen.append(p) or kept_lists(p, i))
    bound = cuda_sm90.bind(problem, q, k, v, [], (), key)
    cuda_sm90.bind(problem, q, k, v, [], (), key)
    for _ in range(2):
        bound(q, k, v, [])
    assert [x.name for x in launches] == ["block_map", "attention_fwd", "attention_fwd"]
    expected = tile_map(spec, length, length, 128, 16)
    assert (expected == EMPTY).any() and (expected == PARTIAL).any()
    assert (listed(seen[0].list_shape, bound.kept) == expected).all()


def test_a_graph_that_is_captured_makes_its_own_lists(tmp_path, monkeypatch, launches) -> None:
    """Once for all calls outside, by each call inside: nothing may be waited for there."""
    spec = BY_NAME["dilated"].spec()
    q, k, v = on_device([torch.zeros(1, 2, 300, 64, dtype=torch.bfloat16)] * 3)
    problem = Problem(spec, q.dtype, q.device, (9, 0), 1, 2, 2, 300, 300, 64, 64)
    key = keys_of(problem, layout_of(spec, []))[0]
    kernels = kernels_of(key.source(), tmp_path / "kernels.so")
    built = Built(bytes(kernels) + b"\0", "", 168, 0, False)
    monkeypatch.setattr(cuda_sm90, "load_first", lambda keys, **_: (keys[0], built))
    monkeypatch.setattr(cuda_sm90_lists, "_kept", {})
    for capturing, expected in ((True, "block_map attention_fwd " * 2),
                                (False, "block_map " + "attention_fwd " * 2)):  # fmt: skip
        launches.clear()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda x=capturing: x)
        bound = cuda_sm90.bind(problem, q, k, v, [], (), key)
        for _ in range(2):
            bound(q, k, v, [])
        assert [x.name for x in launches] == expected.split()
