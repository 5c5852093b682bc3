"""The whole backward of `cuda_sm90` on the CPU: its kernels compiled by the host's C++ compiler
against emulated_sm90.hpp, its launches and parameters as they are, its gradients against float64.

What ptxas makes of the kernels and how fast they are only a GPU shows; where each element of every
tile comes from and goes to, and which barrier is waited for, is what runs here.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import struct
import subprocess

import pytest
import torch
from torch import Tensor

from benchmarks.sm90_backward_dev import compare
from fa3_compile import resources
from fa3_compile.lower.choose import Problem
from fa3_compile.lower.kernels import cuda_sm90_backward as backward
from fa3_compile.lower.kernels import cuda_sm90_backward_parameters, cuda_sm90_parameters
from fa3_compile.lower.kernels.cuda_sm90_backward_keys import keys_of
from fa3_compile.lower.kernels.cuda_sm90_backward_parameters import BackwardParameters
from fa3_compile.lower.kernels.cuda_sm90_keys import layout_of, tile_candidate
from fa3_compile.lower.kernels.reference import attention, attention_backward
from fa3_compile.lower.render_cuda_backward import CudaBackwardKey
from fa3_compile.spec import expr as E
from tests.numerics.forms import BY_NAME, DROPOUT, Form, Shape, inputs

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++")

HEADERS = (
    "captured", "philox", "variant", "block_map", "block_map_build", "operand_tile",
    "query_blocks", "query_map", "scheduler", "fragment", "tile_ring", "backward_rows",
)  # fmt: skip
HOPPER_HEADERS = ("backward_block", "backward_weigher", "backward_consumer")
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
    folder = resources.kernels() / ("include/fa3" if name in HEADERS else "sm90")
    text = re.sub(r"#include.*|#pragma.*", "", (folder / f"{name}.cuh").read_text())
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
    return text.replace("extern __shared__ char memory[];", "char* memory = nullptr;")


def compiled(key: CudaBackwardKey, folder) -> ctypes.CDLL:
    source = key.source()
    own = between(source, "struct alignas(8) Aux", "}  // namespace fa3")
    main = (*HOPPER_HEADERS, "attention_bwd_wide" if key.config.wide else "attention_bwd")
    emulated = resources.kernels().parent / "tests/numerics/emulated_sm90.hpp"
    parts = [f'#define DTYPE {key.dtype}\n#include "{emulated}"']
    parts += [*map(header, (*HEADERS, *main)), "namespace fa3 {", own, "}", "using namespace fa3;"]
    parts += [ENTRY.format(name="row_terms", kernel="Before")]
    parts += [ENTRY.format(name="attention_bwd", kernel="Kernel")]
    parts += [
        "struct AfterKernel { using Params = QueryGradientParams;"
        " static void run(const Params& p) { After::run(p); } };",
        ENTRY.format(name="query_gradient", kernel="AfterKernel"),
    ]
    if "block_map(" in source:
        parts += [re.sub("fa3::", "", "".join(re.findall(r"using Map[VK][ae]r.*;\n?", source)))]
        parts += [ENTRY.format(name="block_map", kernel="MapKernel")]
    (folder / "kernel.cc").write_text("\n".join(parts))
    command = [str(COMPILER), "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread"]
    done = subprocess.run([*command, "kernel.cc", "-o", "kernel.so"], cwd=folder, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[:4000]
    return ctypes.CDLL(str(folder / "kernel.so"))


class EmulatedLaunch:
    """As launch_cuda.Launch, of a function of the compiled library."""

    def __init__(self, kernel, grid, threads, shared, content: bytes, places, names) -> None:
        self.kernel, self.grid, self.threads = kernel, grid, threads
        self.content, self.places, self.names = content, places, names

    def __call__(self, addresses: list[int]) -> None:
        content = bytearray(self.content)
        for offset, what, add in self.places:
            at = self.names.index(what) if isinstance(what, str) else what + len(self.names)
            struct.pack_into("Q", content, offset, addresses[at] + add)
        self.kernel(bytes(content), *self.grid, self.threads)


def emulated_map(x: Tensor, sizes, strides, box) -> bytes:
    content = struct.pack("Q4i4q", x.data_ptr(), *reversed(sizes), *reversed(strides))
    return content + struct.pack("ii", *box[1:]) + bytes(64)


def gradients(problem: Problem, key, folder, dout, dlse, q, k, v, out, lse, aux, sizes, needs):
    library = compiled(key, folder)

    class Module:
        shared_bytes = 0

        def kernel(self, name: str):
            return getattr(library, name)

    parameters = BackwardParameters(key, Module(), q, k, v, dout, out, aux, sizes)  # pyright: ignore
    sinks = any(needs[3 + x.tensor] for x in E.loads_in(*problem.spec.sinks))
    launches = parameters.launches(dlse is not None, key.dead_rows or sinks)
    scratch = torch.full((parameters.scratch_words,), float("nan"))
    counter = torch.zeros(1, dtype=torch.int32)
    dq, dk, dv = (torch.full_like(x, float("nan")) for x in (q, k, v))
    delta, dead = torch.empty_like(lse), torch.empty_like(lse, dtype=torch.int8)
    tile = key.tile if key.tile_gradient else None
    dtile = torch.zeros(1)
    if tile is not None:
        strides = cuda_sm90_backward_parameters.gradient_strides(aux[tile])
        dtile = aux[tile].new_empty_strided(aux[tile].shape, strides)
        whole = cuda_sm90_backward_parameters.is_stored_whole(key, q, k, aux)
        dtile.fill_(float("nan") if whole else 0.0)
    tensors = (q, k, v, out, lse, dout, lse if dlse is None else dlse, dq, dk, dv, counter)
    addresses = [x.data_ptr() for x in (*tensors, scratch, delta, dead, dtile, *aux)]
    for launch in launches:
        launch(addresses)  # pyright: ignore
    assert counter.item() == 0
    grads = (dq, dk, dv)
    flags = dead if key.dead_rows else None
    backward.finish(problem, grads, delta, flags, q, k, v, dout, lse)
    found = backward.captured_gradients(problem, tile, dtile, lse, delta, q, k, aux, sizes, needs)
    return *grads, found


# (form, head dims, lengths, query heads of a KV head, which of the candidates)
CASES = [
    ("causal", (64, 64), (200, 200), 1, 0),
    ("causal", (32, 64), (131, 262), 2, 1),
    ("window", (96, 80), (150, 150), 1, 0),
    ("global and window", (128, 128), (140, 140), 2, 2),
    ("alibi, softcap", (72, 40), (70, 150), 2, 0),
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
]
OWN = (
    Form(
        "dropout, softcap",
        f"score=20.0*tanh(0.005*s), mask=load(1, 0, 0, q, kv) != 0, dead=zero, {DROPOUT}",
        ("seed", "dense"),
    ),
    Form("dense bias, one batch, full", "score=0.1*s + load(0, 0, h, q, kv)", ("bias_of_heads",)),
)
NAMED = BY_NAME | {x.name: x for x in OWN}


# The others take ten seconds each as well: FA3_ALL_FORMS=1.
SHORT = (1, 5, 7, 10, 13, 15)
CHOSEN = CASES if os.environ.get("FA3_ALL_FORMS") == "1" else [CASES[i] for i in SHORT]


@pytest.mark.parametrize("case", CHOSEN, ids=lambda x: f"{x[0]}-{x[1][0]}-{x[4]}")
def test_gradients(case, tmp_path, monkeypatch) -> None:
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
    for module in (cuda_sm90_parameters, cuda_sm90_backward_parameters):
        monkeypatch.setattr(module, "tensor_map", emulated_map)
        monkeypatch.setattr(module, "Launch", EmulatedLaunch)
    monkeypatch.setattr(cuda_sm90_backward_parameters, "processors", lambda device: 2)
    out, lse = attention(spec, q, k, v, aux, form.sizes)
    lse = lse.contiguous()
    torch.manual_seed(0)
    dout, dlse = torch.randn_like(out), None if which else torch.randn_like(lse)
    arguments = (dout, dlse, q, k, v, out.contiguous(), lse, aux, form.sizes, needs)
    found = gradients(problem, key, tmp_path, *arguments)
    wide = [x.double() if x.is_floating_point() else x for x in aux]
    exact = attention_backward(
        spec, dout.double(), None if dlse is None else dlse.double(), q.double(), k.double(),
        v.double(), wide, form.sizes, needs,
    )  # fmt: skip
    eager = attention_backward(spec, dout, dlse, q, k, v, aux, form.sizes, needs)
    wrong, _ = compare(found, exact, eager)
    assert wrong is None
