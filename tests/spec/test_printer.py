"""Printed expressions compute what their text says: torch in process, C++ through g++, Triton
through its interpreter and its compiler."""

import ctypes
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given, settings

from fa3_compile.lower.printers.cuda_placer import KernelPrinter
from fa3_compile.lower.printers.printer import Env, Session, UnprintableError
from fa3_compile.lower.printers.printer_cuda import CudaPrinter
from fa3_compile.lower.printers.printer_torch import TorchPrinter
from fa3_compile.lower.printers.printer_triton import TritonPrinter
from fa3_compile.lower.printers.text import Text
from fa3_compile.spec.expr import trunc
from fa3_compile.spec.text import parse
from tests.spec.by_hand import evaluate, indices, masks, scores

PRINTERS = {"torch": TorchPrinter(), "triton": TritonPrinter(), "cuda": CudaPrinter()}
ENV = Env(
    load=lambda element, index: f"A{element.tensor}[{', '.join(index)}]",
    aux=("float", "bool", "int"),
)

SNAPSHOTS = [
    (
        "50*tanh(0.02*s)",
        "50.0*torch.tanh(0.02*s)",
        "100.0 / (tl.exp2((-0.05770780163555854)*s) + 1.0) - 50.0",
        "100.0f / (exp2f((-0.05770780163555854f)*s) + 1.0f) - 50.0f",
    ),
    (
        "0.125*s + load(0, h, q - kv + Sq - 1)",
        "0.125*s + A0[h, q + Sq - 1 - kv].to(dtype)",
        "0.125*s + tl.cast(A0[h, q + Sq - 1 - kv], tl.float32)",
        "0.125f*s + float(A0[h, q + Sq - 1 - kv])",
    ),
    (
        "~((kv < 3) & (q > 2)) & (load(1, b, kv) != 0)",
        "A1[b, kv] & (~((kv < 3) & (q > 2)))",
        "(((kv < 3) & (q > 2)) == 0) & (A1[b, kv] != 0)",
        "(!((kv < 3) && (q > 2))) && (A1[b, kv] != 0)",
    ),
    (
        "where(load(2, b, q) == load(2, b, kv), s, -3.4028234663852886e+38)",
        "torch.where(A2[b, q] == A2[b, kv], s, -3.4028234663852886e+38)",
        "tl.where(A2[b, q] == A2[b, kv], s, -3.4028234663852886e+38)",
        "(A2[b, q] == A2[b, kv]) ? s : -3.4028234663852886e+38f",
    ),
    (
        "s + pow(2, -0.5*h - 0.5)*(kv - q)",
        "s + torch.exp2(-0.5*(1 + h).to(dtype))*(kv - q).to(dtype)",
        "s + tl.exp2(-0.5*tl.cast(1 + h, tl.float32))*tl.cast(kv - q, tl.float32)",
        "s + exp2f(-0.5f*float(1 + h))*float(kv - q)",
    ),
    (
        "floordiv(q, 3) + mod(kv - q, 4)",
        "q // 3 + (kv - q) % 4",
        "q // 3 + ((kv - q) % 4 + 4) % 4",
        "q / 3 + ((kv - q) % 4 + 4) % 4",
    ),
    (
        "where(kv <= q, s, -inf)",
        'torch.where(kv <= q, s, float("-inf"))',
        'tl.where(kv <= q, s, float("-inf"))',
        "(kv <= q) ? s : __int_as_float(0xff800000)",
    ),
    (
        "where(uniform(load(2, 0), b, h, q, kv - 1) < 0.25, 0, 2)",
        "torch.where(uniform(A2[0], b, h, q, kv - 1, dtype) < 0.25,"
        " torch.full((), 0, dtype=torch.int64, device=device), 2)",
        "tl.where(uniform(A2[0], b, h, q, kv - 1) < 0.25, 0, 2)",
        "(uniform(A2[0], b, h, q, kv - 1) < 0.25f) ? 0 : 2",
    ),
]


@pytest.mark.parametrize("snapshot", SNAPSHOTS, ids=[x[0] for x in SNAPSHOTS])
def test_text(snapshot):
    expr, *expected = snapshot
    assert [p.print(parse(expr), ENV) for p in PRINTERS.values()] == expected


def test_the_maximum_of_nan_in_the_hopper_kernels():
    """What fmaxf answers is the other number."""
    expr = parse("max(min(s, load(0, q)), 0.5) - max(kv - q, 2)")
    found = KernelPrinter().print(expr, ENV)
    assert found == "max_nan(min_nan(float(A0[q]), s), 0.5f) - float(largest(kv - q, 2))"


def test_shared_subexpressions_get_a_variable():
    exprs = [parse("exp(s)*tanh(kv - q) + exp(s)"), parse("kv - q < 3")]
    lines, results = CudaPrinter().print_block(exprs, prefix="u")
    assert lines == ["const auto u0 = kv - q;", "const auto u1 = expf(s);"]
    assert results[1] == "u0 < 3"


def test_a_scale_of_several_functions_of_the_score_is_multiplied_last():
    """Compilers make fma(0.1, x, -0.1*y) of 0.1*x - 0.1*y, which is not 0 where x is y."""

    def printed(formula: str) -> str:
        return CudaPrinter().print(parse(formula), ENV)

    assert printed("0.1*s - 0.1*abs(s) + q") == "0.1f*(s - fabsf(s)) + float(q)"
    assert printed("-0.1*abs(s) - 0.1*exp(s) + q") == "float(q) - 0.1f*(fabsf(s) + expf(s))"
    assert printed("(2*s - 2*abs(s))*exp(s)") == "(2.0f*(s - fabsf(s)))*expf(s)"
    # Not where the sum may be infinite and the terms are not, nor what is no function of s.
    assert printed("0.1*s + 0.1*where(s > 0, -3e38, s)") == (
        "0.1f*s + 0.1f*((s > 0.0f) ? -3e+38f : s)"
    )
    assert printed("0.1*s + 0.1*load(0, q)") == "0.1f*s + 0.1f*float(A0[q])"
    assert printed("0.1*s + 0.2*abs(s)") == "0.1f*s + 0.2f*fabsf(s)"


def test_what_a_language_lacks_is_named():
    with pytest.raises(UnprintableError, match="lgamma"):
        TorchPrinter().print(sympy.Function("lgamma")(sympy.Symbol("s", real=True)))
    with pytest.raises(UnprintableError, match="load"):
        TorchPrinter().print(parse("load(0, q)"))


def test_literals_beyond_float32_are_infinite_and_the_largest_is_not():
    assert TritonPrinter().print(parse("-1e39")) == 'float("-inf")'
    assert CudaPrinter().print(parse("-1e39")) == "__int_as_float(0xff800000)"
    assert float(TritonPrinter().print(parse("-3.4028235e+38"))) == float(np.finfo("f4").min)
    assert TritonPrinter().print(parse("1e-45*s")) == "0.0*s"


# Values of every symbol at a few hundred elements, some of them awkward.
POINTS = {
    "s": np.concatenate([np.linspace(-30, 30, 231), [0.0, 0.5, 1.5, -2.5, 1e-3, -1e-3, 88, -99]]),
}
_COUNT = len(POINTS["s"])
for _name, _period in {"b": 2, "h": 5, "q": 17, "kv": 13, "Sq": 1, "Skv": 1, "n0": 1}.items():
    POINTS[_name] = np.arange(_COUNT) % _period + {"Sq": 17, "Skv": 13, "n0": 3}.get(_name, 0)

FORMULAS = [
    "0.125*s",
    "-s",
    "s*s - pow(s, 3)",
    "50*tanh(0.02*s)",
    "tanh(s)",
    "atan(s)",
    "erf(0.1*s)",
    "sigmoid(0.1*s - 3)",
    "sin(s) + cos(s)",
    "tan(0.03*s)",
    "sinh(0.01*s) + cosh(0.01*s)",
    "exp(0.1*s)",
    "log(abs(s) + 1)",
    "round(s)",
    "floor(s) - ceil(s)",
    "sign(s) + sign(q - kv)",
    "trunc(0.3*s)",
    "abs(s) + abs(q - kv)",
    "max(s, q, 2) - min(s, -kv, 0.5)",
    "pow(abs(s) + 1, -0.5)",
    "pow(abs(s) + 1, 1.7)",
    "pow(tanh(s), 20) + pow(tanh(s), 17)",
    "pow(tanh(s), abs(kv - q))",
    "pow(2, -0.5*h - 0.5)*(kv - q) + s",
    "pow(3, 0.1*h)",
    "pow(n0, -0.5)*s",
    "s*pow(1 + exp(-s), -1)",
    "where((kv <= q) & ~((q > 5) & (kv < 3)), s, -3.4028234663852886e+38)",
    "where((kv <= q) | (q == 4), s, -inf)",
    # A sum that sympy leaves as it is: the factor may be infinite, for all that it knows.
    "where(pow(floordiv(n0, 2), -0.5)*s + -inf < q, s, -1)",
    "where(pow(floordiv(n0, 2), -0.5)*s + inf > q, s, -1)",
    "where(kv != q, where(q < 3, 1, 0), 0.5)",
    "floordiv(kv - q, 4) + mod(kv - q, 4)",
    "-floordiv(q - kv, 4)",
    "-mod(q + 1, 4)",
    "-4*floordiv(q - kv, 4) - floordiv(q - kv, 5)",
    "-3*floordiv(q - kv, 4)*kv - mod(kv, 3)*q",
    "floordiv(kv - q, -3) + 10*mod(kv - q, -3)",
    "floordiv(q, n0) + mod(kv, n0)",
    "mod(q*kv - 7*h, 11)",
    "bitwise_and(kv - q, 5) - bitwise_or(q - kv, h)*bitwise_xor(q, -kv)",
    "left_shift(kv - q, h) + right_shift(kv - 9*q, h)",
    "where(bitwise_and(q, left_shift(1, mod(kv, 8))) != 0, s, mod(right_shift(q, b), 2))",
    "0.5*(q - kv) - q*q*kv",
    "0.3*(q - kv) + 0.7*(kv - Skv) - 2*s - 1",
    "0.3*(q - kv) - 0.3*abs(s) + 0.3*s - 0.7*tanh(s) - 0.7*s + 1",
    "-0.3*q - 0.3*kv - s",
    "1 - 2*q + 3*kv - Skv + Sq",
    # The digits of small numbers.
    "sign(log(exp(s) + 1))",
    "sign(0.5*exp(1e-9*s) - 0.5)",
    "sign(tanh(1e-9*s)) + sign(sinh(1e-9*s))",
    "log(exp(s) + 1) + 2*exp(0.01*s) - 2",
    "0.5*q*pow(kv + 1, -1)",
    "min(trunc(4*log(q + 1)) + 2, Skv - 1)",
]


def expected(formula: str) -> np.ndarray:
    return np.broadcast_to(evaluate(parse(formula), **POINTS), _COUNT)


def close(got: np.ndarray, formula: str, tolerance: float = 3e-6) -> None:
    want = expected(formula).astype(np.float32)
    scale = np.maximum(1, np.abs(want))
    with np.errstate(invalid="ignore"):  # inf - inf
        same = (got == want) | (np.abs(got - want) <= tolerance * scale)
    assert same.all(), f"{formula}: {got[~same][:3]} for {want[~same][:3]}"


def _dtype(result, dtype):
    return result.dtype if isinstance(result, torch.Tensor) else dtype


def run_torch(expr, dtype) -> np.ndarray:
    scope = {k: torch.tensor(v) for k, v in POINTS.items()}
    scope |= {"s": scope["s"].to(dtype), "torch": torch, "dtype": dtype, "device": "cpu"}
    lines, [result] = TorchPrinter().print_block([expr])
    exec("\n".join([*lines, f"result = {result}"]), scope)
    return (
        torch.as_tensor(scope["result"], dtype=_dtype(scope["result"], dtype))
        .expand(_COUNT)
        .numpy()
    )


@pytest.mark.parametrize("formula", FORMULAS)
def test_torch_formulas(formula):
    close(run_torch(parse(formula), torch.float32), formula)


@given(scores)
@settings(max_examples=100)
def test_torch_scores(expr):
    got, want = run_torch(expr, torch.float64), evaluate(expr, **POINTS)
    np.testing.assert_allclose(got, np.broadcast_to(want, _COUNT), rtol=1e-9, atol=1e-9)


@given(indices | masks)
@settings(max_examples=100)
def test_torch_indices_and_masks_are_exact(expr):
    want = evaluate(expr, **POINTS)
    np.testing.assert_array_equal(run_torch(expr, torch.float32), np.broadcast_to(want, _COUNT))


SHIM = """
#include <cmath>
#include <cstdlib>
#include <cstring>
static float __int_as_float(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }
static int max(int a, int b) { return a > b ? a : b; }
static int min(int a, int b) { return a < b ? a : b; }
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_cuda_text_computes_the_formulas(tmp_path):
    names = list(POINTS)
    arguments = ", ".join(f"const {'float' if x == 's' else 'int'}* {x}_" for x in names)
    unpack = "\n    ".join(f"const auto {x} = {x}_[i];" for x in names)
    functions = [SHIM]
    for i, formula in enumerate(FORMULAS):
        lines, [result] = CudaPrinter().print_block([parse(formula)])
        body = "\n    ".join([unpack, *lines, f"out[i] = {result};"])
        functions.append(
            f'extern "C" void f{i}(int n, float* out, {arguments}) {{\n'
            f"  for (int i = 0; i < n; i++) {{\n    {body}\n  }}\n}}"
        )
    (tmp_path / "f.cpp").write_text("\n".join(functions))
    subprocess.run(
        ["g++", "-O1", "-shared", "-fPIC", "-o", tmp_path / "f.so", tmp_path / "f.cpp"], check=True
    )
    library = ctypes.CDLL(str(tmp_path / "f.so"))
    inputs = [v.astype(np.float32 if k == "s" else np.int32) for k, v in POINTS.items()]
    for i, formula in enumerate(FORMULAS):
        out = np.empty(_COUNT, np.float32)
        pointers = [ctypes.c_void_p(x.ctypes.data) for x in (out, *inputs)]
        getattr(library, f"f{i}")(_COUNT, *pointers)
        close(out, formula, tolerance=1e-5)


KERNEL = """
import triton
import triton.language as tl

@triton.jit
def kernel(out, {pointers}, N: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    {unpack}
    {body}
"""

RUN_KERNEL = """
import json, sys
import torch
sys.path.insert(0, sys.argv[1])
import formulas
inputs, count, rows = json.load(open(sys.argv[1] + "/inputs.json"))
tensors = [
    torch.tensor(v, dtype=torch.float32 if k == "s" else torch.int32) for k, v in inputs.items()
]
out = torch.empty(rows, count)
formulas.kernel[(1,)](out, *tensors, N=count, BLOCK=256)
torch.save(out, sys.argv[1] + "/out.pt")
"""


def write_triton_kernel(folder: Path) -> None:
    """One kernel that writes row r of `out` with formula r."""
    body = []
    for row, formula in enumerate(FORMULAS):
        lines, [result] = TritonPrinter().print_block([parse(formula)], prefix=f"t{row}_")
        value = f"tl.zeros([BLOCK], tl.float32) + ({result})"
        body += [*lines, f"tl.store(out + {row} * N + i, {value}, mask=i < N)"]
    source = KERNEL.format(
        pointers=", ".join(f"{x}_" for x in POINTS),
        unpack="\n    ".join(f"{x} = tl.load({x}_ + i, mask=i < N, other=1)" for x in POINTS),
        body="\n    ".join(body),
    )
    (folder / "formulas.py").write_text(source)
    inputs = {k: v.tolist() for k, v in POINTS.items()}
    (folder / "inputs.json").write_text(json.dumps([inputs, _COUNT, len(FORMULAS)]))


def test_triton_text_computes_the_formulas(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    write_triton_kernel(tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    command = [sys.executable, "-c", RUN_KERNEL, str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    got = torch.load(tmp_path / "out.pt").numpy()
    for row, formula in enumerate(FORMULAS):
        close(got[row], formula, tolerance=1e-5)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_triton_text_compiles(tmp_path, monkeypatch, capability):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    write_triton_kernel(tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "formulas", raising=False)
    import formulas  # pyright: ignore[reportMissingImports]

    signature = {"out": "*fp32"}
    signature |= {f"{x}_": "*fp32" if x == "s" else "*i32" for x in POINTS}
    signature |= {"N": "constexpr", "BLOCK": "constexpr"}
    source = ASTSource(formulas.kernel, signature, {"N": _COUNT, "BLOCK": 256})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert "f64" not in compiled.asm["ttir"]  # (the slow path of sin has some in PTX)
    # A maximum of NaN is NaN.
    assert "max.NaN.f32" in compiled.asm["ptx"] and "min.NaN.f32" in compiled.asm["ptx"]
    assert "max.f32" not in compiled.asm["ptx"] and "min.f32" not in compiled.asm["ptx"]


def test_floats_that_are_read_become_integers_of_64_bits():
    """Those of positions and scores are below 2**31."""
    read, score = parse("mod(trunc(load(0, kv)), 7)"), parse("trunc(0.3*s)")
    env = Env(load=lambda load, index: f"x[{index[0]}]", aux=("float",))
    assert "tl.int64" in TritonPrinter().print(read, env)
    assert "(long long)" in CudaPrinter().print(read, env)
    assert "tl.int32" in TritonPrinter().print(score, env)
    assert "int64" not in TritonPrinter().print(score, env)
    name = sympy.Symbol("name", real=True)  # what a kernel calls a part of an expression
    named = Session(TritonPrinter(), env, {name: Text("name", "float")})
    assert named.text(trunc(name)).body == "tl.cast(name, tl.int64)"
