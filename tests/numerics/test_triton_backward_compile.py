"""The Triton backward compiled for GPUs that are not here: matrix instructions, and spills."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.compiler import ASTSource  # noqa: E402

from fa3_compile.lower.binaries import build  # noqa: E402
from fa3_compile.lower.choose import Problem  # noqa: E402
from fa3_compile.lower.kernels import triton_uniform_rows  # noqa: E402
from fa3_compile.lower.kernels.triton_backward import render_key, supports_backward  # noqa: E402
from fa3_compile.lower.tiles.config import SHARED_MEMORY, TritonConfig  # noqa: E402
from fa3_compile.lower.tiles.tune_backward import table_configs  # noqa: E402
from fa3_compile.spec.attention import AttentionSpec  # noqa: E402
from tests.numerics.assembled import assembled, spilled_bytes  # noqa: E402
from tests.numerics.test_triton_compile import (  # noqa: E402
    CAUSAL,
    FORMS,
    VERSION,
    own_caches,  # noqa: F401
    problem,
)

RELATIVE = "attention(score=0.125*s + load(0, h, kv - q + 99), aux=[float])"
BUCKETS = "attention(score=0.125*s + load(0, max(min(kv - q, 7), -7) + 7, h), aux=[float])"
# Bytes of spills that the fastest measured tile of Hopper has, by head dim; and what versions of
# Triton make of the same tiles: since 3.7 it asks ptxas for --regAllocOptLevel=2, which spills more.
SPILLS = {(90, 128): 128, (90, 192): 300, (90, 256): 1200}
SPILLS |= {
    "3.6": {(80, 128): 64},
    "3.7": {(90, 64): 48, (90, 256): 1408},
    "3.9": {(90, 128): 280, (90, 256): 1368, (100, 128): 48},
}.get(VERSION, {})


def compiled(asked: Problem, name: str, config: TritonConfig, wanted: tuple[int, ...] = ()):
    """Triton's CompiledKernel for contiguous inputs of an even length."""
    kernel = getattr(build.load(render_key(asked, wanted)), name)
    element = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[asked.dtype]
    kinds = {"float": "*fp32", "int": "*i64", "bool": "*i1"}
    given = {
        "GROUP": 1,
        "EVEN_KV": True,
        "EVEN_Q": True,
        "DEAD_ROWS": asked.spec.dead != "nan",
        "HAS_DLSE": False,
        "BLOCK_Q": config.block_q,
        "BLOCK_KV": config.block_kv,
        "PLACE": "own",
        "PRECISION": "tf32" if asked.dtype.itemsize == 2 else "ieee",
    }
    constants, signature, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.arg_names):
        if parameter in given or parameter.endswith("stride_d"):
            constants[parameter] = given.get(parameter, 1)
            signature[parameter] = "constexpr"
            continue
        if aux := re.fullmatch(r"aux(\d+)", parameter):
            signature[parameter] = kinds[asked.spec.aux[int(aux[1])]]
        elif parameter == "dead_ptr":
            signature[parameter] = "*i8"
        elif parameter.endswith("_ptr"):
            inputs = r"(q|k|v|out|dout|dq|dk|dv)_ptr"
            signature[parameter] = element if re.fullmatch(inputs, parameter) else "*fp32"
        else:
            signature[parameter] = "i32"
        if parameter not in ("B", "H", "first_tile", "first_outer", "skew"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    major, minor = asked.capability or (8, 0)
    source = ASTSource(kernel, signature, constants, attributes)
    return assembled(source, 10 * major + minor, config.options(asked.dtype))


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_default_configs(arch: int, dim: int) -> None:
    asked = problem(CAUSAL, dim, arch)
    configs = table_configs(asked)
    for name, config in (("key_blocks", configs.keys), ("query_blocks", configs.queries)):
        kernel = compiled(asked, name, config)
        assert spilled_bytes(kernel) <= SPILLS.get((arch, dim), 0), name
        assert kernel.metadata.shared <= SHARED_MEMORY[divmod(arch, 10)]
        product = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[arch]
        assert product in kernel.asm["ptx"]
        assert "atom" not in kernel.asm["ptx"]


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_rows_without_a_key(arch: int) -> None:
    module = build.load(triton_uniform_rows.UniformKey(AttentionSpec()))
    given = {"GROUP": 4, "SLOPE": True, "PRECISION": "tf32", "BLOCK": 64, "TILE": 64}
    pointers = {"dead_ptr": "*i8", "lost_ptr": "*i8", "delta_ptr": "*fp32", "sums_ptr": "*fp32"}
    for kernel in (module.uniform_sums, module.add_uniform_rows):
        kinds = [
            "constexpr" if x in given or x.endswith("stride_d")
            else pointers.get(x, "*bf16") if x.endswith("_ptr")
            else "fp32" if x == "weight" else "i32"
            for x in kernel.arg_names
        ]  # fmt: skip
        constants = {
            x: given.get(x, 1) for x, k in zip(kernel.arg_names, kinds) if k == "constexpr"
        }
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, (x, kind) in enumerate(zip(kernel.arg_names, kinds))
            if kind[0] == "*" or "stride" in x and kind != "constexpr"
        }
        source = ASTSource(kernel, dict(zip(kernel.arg_names, kinds)), constants, aligned)
        found = assembled(source, arch, triton_uniform_rows.CONFIG.options(torch.bfloat16))
        assert spilled_bytes(found) == 0, kernel.__name__
        assert found.metadata.shared <= SHARED_MEMORY[divmod(arch, 10)]


@pytest.mark.parametrize(("arch", "dim"), [(80, 64), (90, 64), (90, 128), (100, 128)])
def test_what_depends_on_the_distance(arch: int, dim: int) -> None:
    """It is summed in registers, whose rows are moved by a column once, at the end."""
    asked = problem(RELATIVE, dim, arch)
    config = table_configs(asked).diagonals
    kernel = compiled(asked, "dense0", config, (0,))
    assert spilled_bytes(kernel) <= 84
    assert kernel.metadata.shared <= SHARED_MEMORY[divmod(arch, 10)]
    assert "atom" not in kernel.asm["ptx"]
    products = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[arch]
    assert products in kernel.asm["ptx"]
    stores = re.findall(r"st\.global", kernel.asm["ptx"])
    assert len(stores) <= config.block_q * config.block_kv // (32 * config.num_warps)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_what_keys_share(arch: int) -> None:
    """The sums of dS and P that make its gradient sum to what it should."""
    asked = replace(problem(BUCKETS, 64, arch), aux_needs_grad=(True,))
    kernel = compiled(asked, "query_blocks", table_configs(asked).queries, (0,))
    assert "ds_sum" in render_key(asked, (0,)).source()
    assert spilled_bytes(kernel) == 0


@pytest.mark.parametrize("form", FORMS)
def test_forms_compile_for_hopper(form: str) -> None:
    """With the gradient of everything that has one."""
    asked = problem(FORMS[form], 128, 90)
    wanted = tuple(i for i, kind in enumerate(asked.spec.aux) if kind == "float")
    configs = table_configs(asked)
    names = ["row_terms", "key_blocks", "query_blocks", *(["dense0"] * (form == "dense bias"))]
    for name in names:
        config = configs.keys if name == "key_blocks" else configs.queries
        ptx = compiled(asked, name, config, wanted).asm["ptx"]
        assert ("wgmma.mma_async" in ptx) or name == "row_terms"


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_weights_without_a_softmax(arch: int) -> None:
    """Gradients of sigmoid attention with a bias, and no LSE to rebuild anything from."""
    fields = "normalize=none, score=sigmoid(0.125*s + load(0, h, q)), mask=(kv - q <= 0)"
    asked = problem(f"attention({fields}, aux=[float])", 64, arch)
    configs = table_configs(asked)
    for name, config in (("key_blocks", configs.keys), ("query_blocks", configs.queries)):
        kernel = compiled(asked, name, config, (0,))
        assert "lse_ptr" not in kernel.asm["ttir"]
        assert kernel.metadata.shared <= SHARED_MEMORY[divmod(arch, 10)]


@pytest.mark.parametrize(
    "fields",
    [
        "score=0.125*s, mask=(kv - q >= 1), dead=score, fill=s - 99.0, aux=[float]",
        "score=load(0, q, kv) + s, mask=(kv - q >= 1), dead=score, fill=s + load(0, q, kv),"
        " weight=where(uniform(load(1, 0), b, h, q, kv + 1) < 0.1, 0, load(0, q, kv)),"
        " aux=[float, int]",
    ],
    ids=["fill", "fill, bias, gate"],
)
def test_rows_without_a_key_compile(fields: str) -> None:
    asked = problem(f"attention({fields})", 64, 90)
    config = TritonConfig(64, 32, 4, 1)
    for name in ["row_terms", "key_blocks", "query_blocks", *(["dense0"] * ("q, kv" in fields))]:
        assert compiled(asked, name, config, (0,)).asm["ptx"]


@pytest.mark.parametrize(("arch", "dim"), [(80, 128), (90, 64), (90, 256), (100, 64)])
def test_float32_multiplies_without_tensor_cores(arch: int, dim: int) -> None:
    asked = replace(problem(FORMS["window with a fill"], dim, arch), dtype=torch.float32)
    on_gpu = replace(asked, device=torch.device("cuda"))
    assert "cuBLAS" in (supports_backward(on_gpu) or "")
    assert supports_backward(replace(on_gpu, q_len=2**15, kv_len=2**15)) is None
    configs = table_configs(asked)
    for name in ("row_terms", "key_blocks", "query_blocks"):
        config = configs.keys if name == "key_blocks" else configs.queries
        kernel = compiled(asked, name, config)
        # The smallest tile that tl.dot takes, 16 x 16, spills 1036 bytes at a head dim of 256.
        assert spilled_bytes(kernel) <= (32 if dim == 64 else 1100), name
        assert kernel.metadata.shared <= SHARED_MEMORY[divmod(arch, 10)]
        assert not re.search(r"mma\.|mma_", kernel.asm["ptx"])


@pytest.mark.parametrize(
    ("mask", "learned", "is_left"),
    [
        ("mask=load(1, b, kv), dead=nan", (True, False), True),
        ("mask=load(1, b, kv), dead=zero", (True, False), False),
        ("mask=load(1, b, kv), dead=nan", (False, False), False),
        ("mask=kv <= q, dead=nan", (True, False), False),
    ],
)
def test_gradients_of_what_weighs_rows_of_nan(mask, learned, is_left):
    spec = AttentionSpec.parse(
        f"attention(score=0.125*s, {mask}, weight=load(0, kv), aux=[float, bool])"
    )
    problem = Problem(
        spec, torch.bfloat16, torch.device("cuda"), (9, 0), 2, 4, 4, 256, 256, 64, 64,
        (torch.float32, torch.bool), True, learned,
    )  # fmt: skip
    assert ("rows without a key are NaN" in (supports_backward(problem) or "")) == is_left
