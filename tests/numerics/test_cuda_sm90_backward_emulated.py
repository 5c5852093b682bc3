"""The whole backward of `cuda_sm90` on the CPU: its kernels compiled by the host's C++ compiler
against emulated_sm90.hpp and launched by host_driver.cc, all else as it is on a GPU, its gradients
against float64.

What ptxas makes of the kernels and how fast they are only a GPU shows; where each element of every
tile comes from and goes to, and which barrier is waited for, is what runs here.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import pytest
import torch

from benchmarks.kernels.sm90_backward import compare
from fa3_compile import resources
from fa3_compile.lower.binaries.build_nvrtc import Built
from fa3_compile.lower.choose import Problem
from fa3_compile.lower.kernels import cuda_sm90_backward as backward
from fa3_compile.lower.kernels import cuda_sm90_backward_parameters, cuda_sm90_parameters
from fa3_compile.lower.kernels.cuda_sm90_backward_keys import keys_of
from fa3_compile.lower.kernels.cuda_sm90_keys import layout_of, tile_candidate
from fa3_compile.lower.kernels.reference import attention, attention_backward
from fa3_compile.lower.render.render_cuda_backward import CudaBackwardKey
from fa3_compile.runtime.op import BackwardInputs
from fa3_compile.spec import expr as E
from tests.host_driver import launches, on_device, on_host, shared_library
from tests.numerics.forms import BY_NAME, DROPOUT, Form, Shape, inputs

__all__ = ["launches"]

HEADERS = (
    "captured", "philox", "variant", "block_map", "block_map_build", "operand_tile",
    "query_blocks", "query_map", "scheduler", "fragment", "tile_ring", "progress", "backward_rows",
)  # fmt: skip
HOPPER_HEADERS = (
    "query_gradient",
    "backward_beside",
    "backward_block",
    "backward_weigher",
    "backward_consumer",
)
ENTRY = """
extern "C" void {name}(const void* p, unsigned x, unsigned y, unsigned z, int threads) {{
  launch<{kernel}, {kernel}::Params>(p, x, y, z, threads);
}}
"""


def between(text: str, first: str, last: str) -> str:
    start = text.index(first)
    return text[start : text.index(last, start)]


def header(name: str) -> str:
    """A header of the kernels without what emulated_sm90.hpp has in its place."""
    (file,) = resources.kernels().rglob(f"{name}.cuh")
    text = re.sub(r"#include.*|#pragma.*", "", file.read_text())
    if name == "captured":
        return "namespace fa3 {" + text[text.index("// min and max of CUDA") :]
    if name == "fragment":
        return "namespace fa3 {" + between(text, "// x[i] of", "FA3_DEVICE void load_shared") + "}"
    if name == "tile_ring":  # a slot is a TileCoord
        slot = "emulated::memory_base + slots + 16 * state.stage()"
        text = re.sub(
            r'asm volatile\("st.*?"memory"\);', f"std::memcpy({slot}, &tile, 16);", text, flags=re.S
        )
        text = re.sub(
            r'asm volatile\("ld.*?"memory"\);', f"std::memcpy(&tile, {slot}, 16);", text, flags=re.S
        )
    if name == "progress":
        return "namespace fa3 { constexpr int kCounterInts = 32; }"
    return text.replace("extern __shared__ char memory[];", "char* memory = nullptr;")


def compiled(key: CudaBackwardKey, to: Path) -> Path:
    """A library of a key's kernels."""
    source = key.source()
    own = between(source, "struct alignas(8) Aux", "}  // namespace fa3")
    main = (*HOPPER_HEADERS, "attention_bwd_wide" if key.config.wide else "attention_bwd")
    emulated = resources.kernels().parent / "tests/numerics/emulated_sm90.hpp"
    parts = [f'#define DTYPE {key.dtype}\n#include "{emulated}"']
    parts += [*map(header, (*HEADERS, *main)), "namespace fa3 {", own, "}", "using namespace fa3;"]
    parts += [ENTRY.format(name="row_terms", kernel="Before")]
    parts += [ENTRY.format(name="attention_bwd", kernel="Kernel")]
    parts += [ENTRY.format(name="nan_values", kernel="NanValues")]
    if not key.config.finishes:
        parts += [
            "struct AfterKernel { using Params = QueryGradientParams;"
            " static void run(const Params& p) { After::run(p); } };",
            ENTRY.format(name="query_gradient", kernel="AfterKernel"),
        ]
    if "block_map(" in source:
        parts += [re.sub("fa3::", "", "".join(re.findall(r"using Map[VK][ae]r.*;\n?", source)))]
        parts += [ENTRY.format(name="block_map", kernel="MapKernel")]
    parts += ['extern "C" { int shared_bytes = Kernel::kSharedBytes, counters[256]; }']
    return shared_library("\n".join(parts), to)


# (form, head dims, lengths, query heads of a KV head, which of the candidates)
CASES = [
    ("causal", (64, 64), (200, 200), 1, 0),
    ("causal", (32, 64), (131, 262), 2, 1),
    ("window", (96, 80), (150, 150), 1, 0),
    ("global and window", (128, 128), (140, 140), 2, 2),
    ("alibi, softcap", (72, 40), (70, 150), 2, 0),
    ("sigmoid of s", (64, 64), (70, 150), 1, 0),
    ("left padding", (64, 64), (150, 150), 2, 0),
    ("key mask, least", (40, 40), (70, 140), 1, 0),
    ("documents", (64, 64), (300, 300), 2, 0),
    ("dense mask", (48, 64), (90, 200), 1, 0),
    ("dense bias", (64, 64), (136, 136), 1, 0),
    ("dense bias, one batch", (80, 80), (72, 136), 2, 0),
    ("dense bias with -inf", (64, 64), (80, 136), 1, 0),
    ("sink", (64, 32), (100, 100), 2, 0),
    ("dropout, causal", (64, 64), (140, 140), 2, 0),
    ("weight by row and head", (96, 96), (70, 140), 1, 0),
    ("causal", (192, 136), (130, 130), 2, 0),
    ("softcap", (136, 256), (70, 140), 1, 0),
    ("dense bias", (144, 144), (72, 136), 2, 0),
    ("documents", (160, 160), (150, 150), 1, 0),
    # As the first ones, without the bits of `Sm90BackwardConfig.bits`, and in other tiles.
    ("documents", (64, 64), (300, 300), 2, 6),
    ("dropout, causal", (64, 64), (140, 140), 2, 6),
    ("dense mask", (80, 80), (90, 200), 2, 2),
    ("dropout, softcap", (128, 128), (140, 140), 2, 0),
    # Stored a step later; by batches in turn; both, and with two heads a KV head.
    ("dense bias", (128, 128), (200, 136), 1, 2),
    ("dense bias, one batch, full", (64, 64), (136, 136), 1, 6),
    ("dense bias, one batch", (128, 96), (200, 136), 2, 6),
    ("dense bias, one batch", (160, 144), (72, 136), 1, 1),
    ("no key, a fill added", (40, 40), (70, 72), 2, 0),
    ("bias of fills", (40, 40), (70, 72), 2, 0),
    # Heads enough for shares of each kind.
    ("causal", (136, 144), (130, 130), 1, 0),
    # Of a tile's 128 keys the last 64 are seen a query block later than the first.
    ("causal", (72, 40), (150, 150), 2, 0),
]
OWN = (
    Form(
        "dropout, softcap",
        f"score=20.0*tanh(0.005*s), mask=load(1, 0, 0, q, kv) != 0, dead=zero, {DROPOUT}",
        ("seed", "dense"),
    ),
    Form("dense bias, one batch, full", "score=0.1*s + load(0, 0, h, q, kv)", ("bias_of_heads",)),
    # Of an LSE of -5e8 or -1e9 float32 has no logarithm of a sum left.
    Form(
        "no key, a fill added",
        "score=0.1*s + where(load(0, b, 0, 0, kv) != 0, 0, -5e8) - 0.25",
        ("nothing",),
    ),
    Form("bias of fills", "score=0.1*s + load(0, b, 0, q, kv)", ("fills",)),
)
NAMED = BY_NAME | {x.name: x for x in OWN}


# The others take ten seconds each as well: FA3_ALL_FORMS=1.
SHORT = (1, 5, 7, 10, 13, 15, 19, 28, 29, 30, 31)
CHOSEN = CASES if os.environ.get("FA3_ALL_FORMS") == "1" else [CASES[i] for i in SHORT]


@pytest.mark.parametrize("case", CHOSEN, ids=lambda x: f"{x[0]}-{x[1][0]}-{x[4]}")
def test_gradients(case, tmp_path, monkeypatch, launches) -> None:
    name, dims, lengths, group, which = case
    form = NAMED[name]
    spec = form.spec()
    shape = Shape(2, 2, 2 // group, *lengths, *dims)
    dtype = torch.float16 if which == 1 else torch.bfloat16
    q, k, v, aux = inputs(form, shape, dtype, "cpu")
    tile = tile_candidate(spec)
    scored = {x.tensor for x in E.loads_in(spec.score)}
    read = scored | (
        {x.tensor for x in E.loads_in(spec.weight)} if spec.weight is not None else set()
    )
    wanted = [x.is_floating_point() and i not in read for i, x in enumerate(aux)]
    if tile is not None:
        wanted[tile.tensor] = True
    needs = [True, True, True, *wanted]
    problem = Problem(spec, dtype, torch.device("cuda:0"), (9, 0), *vars(shape).values(),
                      aux_dtypes=tuple(x.dtype for x in aux), needs_grad=True,
                      aux_needs_grad=tuple(wanted))  # fmt: skip
    assert backward.supports_backward(problem) is None
    key = keys_of(problem, layout_of(spec, aux))[which]
    library = compiled(key, tmp_path / "kernels.so")
    built = Built(bytes(library) + b"\0", "", 168, 0, False)
    monkeypatch.setattr(backward, "keys_of", lambda *_: [key])
    monkeypatch.setattr(backward, "load_best", lambda keys, at_once: (key, built))
    monkeypatch.setattr(cuda_sm90_backward_parameters, "processors", lambda device: 2)
    # Where the main kernel rounds dQ, each head's sums follow another's in the same place.
    monkeypatch.setattr(cuda_sm90_parameters, "SECTION_BYTES", 1)
    monkeypatch.setattr(cuda_sm90_backward_parameters, "AHEAD", 0)
    out, lse = attention(spec, q, k, v, aux, form.sizes)
    torch.manual_seed(0)
    dout = torch.randn_like(out)
    dlse = None if which else torch.randn_like(lse)
    stored = out.contiguous(), lse.contiguous()
    given = BackwardInputs(dout, dlse, q, k, v, *stored, aux, form.sizes, needs)
    found = backward.run_backward(problem, on_device(given))
    assert "attention_bwd" in [x.name for x in launches]
    assert not any((ctypes.c_int * 256).in_dll(ctypes.CDLL(str(library)), "counters"))
    wide = [x.double() if x.is_floating_point() else x for x in aux]
    exact = attention_backward(
        spec, dout.double(), None if dlse is None else dlse.double(), q.double(), k.double(),
        v.double(), wide, form.sizes, needs,
    )  # fmt: skip
    eager = attention_backward(spec, dout, dlse, q, k, v, aux, form.sizes, needs)
    wrong, _ = compare(on_host(found), exact, eager)
    assert wrong is None
