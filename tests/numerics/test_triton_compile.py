"""`triton` compiled for GPUs that are not here: no spills, and the matrix instructions."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.compiler import ASTSource  # noqa: E402

from fa3_compile.lower.binaries import build  # noqa: E402
from fa3_compile.lower.choose import Problem  # noqa: E402
from fa3_compile.lower.kernels.triton_forward import TritonForward  # noqa: E402
from fa3_compile.lower.kernels.triton_keys import render_key  # noqa: E402
from fa3_compile.lower.kernels.triton_split import COMBINE  # noqa: E402
from fa3_compile.lower.render.render import chunks  # noqa: E402
from fa3_compile.lower.render.render_forward import ForwardKey, is_prefix, render_forward  # noqa: E402
from fa3_compile.lower.tiles import tune_forward  # noqa: E402
from fa3_compile.lower.tiles.config import SHARED_MEMORY, TritonConfig  # noqa: E402
from fa3_compile.spec.attention import AttentionSpec  # noqa: E402
from tests.numerics.assembled import assembled, spilled_bytes  # noqa: E402

FULL = "attention(score=0.125*s)"
CAUSAL = "attention(score=0.125*s, mask=(kv - q <= 0))"
FORMS = {
    "softcap": "attention(score=20.0*tanh(0.00625*s), mask=(kv - q <= 0))",
    "alibi": "attention(score=0.125*s + load(0, 0, h, 0, 0)*(kv - q), mask=(kv - q <= 0),"
    " aux=[float])",
    "window with a fill": "attention(score=0.125*s, mask=(kv - q <= 0) & (q - kv <= 99),"
    " dead=score, fill=-3.4028234663852886e38)",
    "dense bias": "attention(score=0.125*s + load(0, 0, h, q, kv), aux=[float])",
    "documents": "attention(score=0.125*s, mask=(load(0, b, q) == load(0, b, kv)) & (kv - q <= 0),"
    " aux=[int])",
    "key mask": "attention(score=0.125*s, mask=load(0, b, 0, 0, kv) != 0, dead=zero, aux=[bool])",
    "sinks": "attention(score=0.125*s, mask=(kv - q <= 0), sinks=[load(0, h)], aux=[float])",
    "dropout": "attention(score=0.125*s, mask=(kv - q <= 0), aux=[int],"
    " weight=where(uniform(load(0, 0), b, h, q, kv) < 0.25, 0, 1.3333333333333333))",
}
HEADS = (64, 96, 128, 192, 256)
VERSION = triton.__version__.rpartition(".")[0]
# Bytes that are spilled, by architecture and head dim, or in decoding wide heads: on sm_100 their
# output comes out of tensor memory at the end, in float32. Since 3.7 Triton asks ptxas for
# --regAllocOptLevel=2, which spills more.
SPILLS: dict[tuple[int, int | str], int] = {(100, "decoding"): 432}
SPILLS |= {
    "3.6": {(100, 384): 16},
    "3.7": {
        (90, 576): 640,
        (90, "decoding"): 392,
        (100, 320): 72,
        (100, 384): 48,
        (100, 576): 176,
    },
    "3.9": {
        (90, 256): 144,
        (90, 576): 600,
        (90, "decoding"): 312,
        (100, 320): 136,
        (100, 384): 144,
        (100, 576): 712,
    },
}.get(VERSION, {})


@pytest.fixture(autouse=True, scope="module")
def own_caches(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FA3_CACHE_DIR", str(tmp_path_factory.mktemp("fa3")))
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        build.load.cache_clear()
        yield
        build.load.cache_clear()


def problem(text: str, dim: int, arch: int, dtype=torch.bfloat16, length=4096) -> Problem:
    capability = divmod(arch, 10)
    shape = (2, 4, 4, length, length, dim, dim)
    return Problem(AttentionSpec.parse(text), dtype, torch.device("cuda"), capability, *shape)


def compiled(
    asked: Problem,
    config: TritonConfig,
    lists: bool = False,
    odd: tuple[str, ...] = (),
    split: bool = False,
    shared: bool = False,
    function: str = "attention_forward",
):
    """Triton's CompiledKernel for contiguous inputs of an even length.

    odd       how the names begin of integers that are no multiple of 16
    split     it leaves parts, which `function` "attention_combine" puts together
    shared    V is a part of K
    """
    spec = asked.spec
    kernel = getattr(build.load(render_key(asked, config, lists, split, shared)), function)
    element = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
    kinds = {"float": "*fp32", "int": "*i64", "bool": "*i1"}
    constants = {
        "GROUP": asked.group,
        "EVEN_KV": True,
        "DEAD_ROWS": spec.dead != "nan",
        "BLOCK_Q": config.block_q,
        "BLOCK_KV": config.block_kv,
        "PRECISION": "tf32" if asked.dtype.itemsize == 2 else "ieee",
    }
    signature, attributes = {}, {}
    for name in kernel.arg_names:
        if name.endswith("stride_d"):
            constants[name] = 1
    constants = {x: value for x, value in constants.items() if x in kernel.arg_names}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("lists_ptr", "counts_ptr"):
            signature[name] = "*i32"
        elif name.endswith("_ptr"):
            floats = ("lse_ptr", "parts_ptr", "states_ptr")
            signature[name] = "*fp32" if name in floats else element[asked.dtype]
        elif re.fullmatch(r"aux\d+", name):
            signature[name] = kinds[spec.aux[int(name[3:])]]
        else:
            signature[name] = "i32"
        if signature[name] != "constexpr" and not name.startswith(("H", "PARTS", *odd)):
            attributes[(i,)] = [["tt.divisibility", 16]]
    major, minor = asked.capability or (8, 0)
    source = ASTSource(kernel, signature, constants, attributes)
    return assembled(source, 10 * major + minor, config.options(asked.dtype))


def check(asked: Problem, arch: int):
    config = tune_forward.table_config(asked)
    assert config.fits(asked, divmod(arch, 10)), config
    kernel = compiled(asked, config)
    assert spilled_bytes(kernel) <= SPILLS.get((arch, asked.dim), 0), config
    assert kernel.metadata.shared <= SHARED_MEMORY[divmod(arch, 10)]
    return kernel.asm["ptx"]


@pytest.mark.parametrize("dim", HEADS)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_default_configs_fit_without_spills(arch: int, dim: int) -> None:
    for text in (FULL, CAUSAL):
        asked = problem(text, dim, arch)
        ptx = check(asked, arch)
        product = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[arch]
        assert product in ptx
        described = tune_forward.table_config(asked).tma
        assert ("cp.async.bulk.tensor" in ptx) == described and (described or arch != 100)


# DeepSeek's absorbed latent attention: 128 query heads on one head of keys.
LATENT = {"heads": 128, "kv_heads": 1, "dim": 576, "v_dim": 512}
WIDE = [(arch, width) for arch in (80, 90, 100) for width in tune_forward.WIDE[divmod(arch, 10)]]


@pytest.mark.parametrize(("arch", "width"), WIDE)
def test_tiles_of_wide_heads_fit_without_spills(arch: int, width: int) -> None:
    asked = replace(problem(CAUSAL, width, arch), heads=128, kv_heads=1)
    config = tune_forward.table_config(asked)
    assert config.packed
    kernel = compiled(asked, config)
    assert spilled_bytes(kernel) <= SPILLS.get((arch, width), 0)
    check_room(kernel, arch)


def check_room(kernel, arch: int) -> None:
    assert kernel.metadata.shared <= SHARED_MEMORY[divmod(arch, 10)]
    assert getattr(kernel.metadata, "tmem_size", 0) <= 512


@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_decoding_of_few_latent_heads(arch: int) -> None:
    """As tensor parallelism leaves them to each of eight GPUs."""
    asked = replace(problem(FULL, 576, arch), **LATENT | {"heads": 16}, q_len=1)
    config = tune_forward.table_config(asked, shared=True)
    assert config.block_q == 16 and config.packed
    kernel = compiled(asked, config, split=True, shared=True)
    assert spilled_bytes(kernel) == 0
    check_room(kernel, arch)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_decoding_of_latent_attention(arch: int) -> None:
    """V, which is a part of K, is loaded once; the parts of a split are put together."""
    asked = replace(problem(FULL, 576, arch), **LATENT, q_len=1)
    config = tune_forward.table_config(asked, shared=True)
    kernel = compiled(asked, config, split=True, shared=True)
    assert spilled_bytes(kernel) <= SPILLS.get((arch, "decoding"), 0)
    check_room(kernel, arch)
    product = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[arch]
    assert product in kernel.asm["ptx"]
    described = len(re.findall("tt.make_tensor_descriptor", kernel.asm["ttir"]))
    assert described == (2 if config.tma else 0)
    combine = compiled(asked, COMBINE, split=True, shared=True, function="attention_combine")
    assert spilled_bytes(combine) == 0


@pytest.mark.parametrize(("arch", "widest"), [((8, 0), 1024), ((8, 9), 768), ((9, 0), 1024)])
def test_float32_of_wide_heads(arch: tuple[int, int], widest: int) -> None:
    """Shared memory holds a block of keys and one of values."""
    asked = replace(problem(FULL, widest, 80, torch.float32), capability=arch)
    assert TritonForward().supports(asked) is None
    assert f"8 to {widest}" in str(TritonForward().supports(replace(asked, v_dim=widest + 1)))
    config = tune_forward.table_config(asked)
    assert 4 * 2 * config.block_kv * widest < SHARED_MEMORY[arch]


@pytest.mark.parametrize(
    ("dims", "expected"),
    [
        ((576, 512), True),
        ((576, 576), True),
        ((576, 256), False),  # a chunk of 512 is not one of 256
        ((512, 576), False),
        ((320, 256), True),
        ((320, 248), True),
        ((264, 264), True),
    ],
)
def test_values_that_are_chunks_of_keys(dims: tuple[int, int], expected: bool) -> None:
    assert is_prefix(*dims) == expected


@pytest.mark.parametrize("form", FORMS)
def test_forms_compile_for_hopper(form: str) -> None:
    ptx = check(problem(FORMS[form], 128, 90), 90)
    assert "wgmma.mma_async" in ptx
    assert ("tanh.approx.f32" in ptx) == (form == "softcap")


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_walking_lists_is_as_cheap(arch: int) -> None:
    asked = problem(FORMS["documents"], 128, arch)
    config = tune_forward.table_config(asked)
    kernel = compiled(asked, config, lists=True)
    assert spilled_bytes(kernel) == 0
    assert kernel.metadata.shared <= SHARED_MEMORY[divmod(arch, 10)]
    assert ("cp.async" in kernel.asm["ptx"]) or arch == 100


SIGMOID = "attention(normalize=none, score=sigmoid(0.125*s - 8.0), mask=(kv - q <= 0))"


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_weights_without_a_softmax(arch: int) -> None:
    """The tiles of the softmax fit, and the loop has neither a maximum nor a sum."""
    asked = problem(SIGMOID, 128, arch)
    kernel = compiled(asked, tune_forward.table_config(asked))
    assert spilled_bytes(kernel) == 0
    assert kernel.metadata.shared <= SHARED_MEMORY[divmod(arch, 10)]
    assert "tt.reduce" not in kernel.asm["ttir"]


@pytest.mark.parametrize("arch", [80, 90])
def test_conditional_rescaling_compiles(arch: int) -> None:
    asked = problem(CAUSAL, 128, arch)
    config = replace(tune_forward.table_config(asked), lazy_rescale=True)
    assert config.fits(asked, divmod(arch, 10)) and not config.fits(asked, (10, 0))
    assert spilled_bytes(compiled(asked, config)) == 0


@pytest.mark.parametrize("dim", [64, 256])
def test_float32_uses_no_tensor_cores(dim: int) -> None:
    ptx = check(problem(CAUSAL, dim, 80, torch.float32), 80)
    assert "mma" not in ptx.replace("fma", "")


def test_float32_scores_have_the_roundings_of_eager() -> None:
    """200*s - max is two roundings, as there; the products of Q and K are one each, as cuBLAS's."""
    asked = problem("attention(score=200.0*s)", 64, 90, torch.float32)
    config = tune_forward.table_config(asked)
    ptx = compiled(asked, config).asm["ptx"]
    products = config.block_q * config.block_kv * 2 * 64
    assert ptx.count("fma.rn.f32") == products // (32 * config.num_warps)
    half = problem("attention(score=200.0*s)", 64, 90)
    assert "fma.rn.f32" in compiled(half, tune_forward.table_config(half)).asm["ptx"]


def test_full_blocks_have_no_mask() -> None:
    """Only the loop over masked blocks compares keys with queries."""
    asked = problem(CAUSAL, 64, 90)
    loops = compiled(asked, TritonConfig(128, 32, 4, 3)).asm["ttir"].split("scf.for")[1:]
    full, masked = (x.split("scf.yield")[0] for x in loops)
    assert "128x32xi1" not in full
    assert "128x32xi1" in masked


def test_chunks_cover_a_head_with_powers_of_two() -> None:
    widths = {d: [x.width for x in chunks("k", d)] for d in (8, 40, 64, 80, 96, 112, 160, 192, 256)}
    assert widths == {
        8: [16],
        40: [32, 16],
        64: [64],
        80: [64, 16],
        96: [64, 32],
        112: [128],
        160: [128, 32],
        192: [128, 64],
        256: [256],
    }


def test_no_string_of_the_user_reaches_the_source() -> None:
    """Two specs of the same text give the same source; the source names only its own words."""
    spec = AttentionSpec.parse(FORMS["alibi"])
    assert render_forward(ForwardKey(spec, 64, 64)) == render_forward(ForwardKey(spec, 64, 64))
    with pytest.raises(ValueError, match="vocabulary"):
        AttentionSpec.parse("attention(score=__import__('os').system('true'))")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"dtype": torch.complex64}, "complex64"),
        ({"dim": 1025}, "head dim is 1025"),
        ({"v_dim": 7}, "value head dim is 7"),
        ({"device": torch.device("cpu"), "capability": None}, "not on cpu"),
        ({"capability": (7, 5)}, "8.0"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_says_what_it_does_not_take(change, reason: str) -> None:
    from dataclasses import replace

    asked = problem(CAUSAL, 64, 90)
    kernel = TritonForward()
    assert kernel.supports(asked) is None
    said = kernel.supports(replace(asked, **change))
    assert said is not None and reason in said


def test_a_damaged_entry_is_rebuilt(tmp_path, monkeypatch) -> None:
    from fa3_compile.lower.binaries import cache

    monkeypatch.setenv("FA3_CACHE_DIR", str(tmp_path / "private"))
    key = ForwardKey(AttentionSpec(), 64, 64)
    build.load.cache_clear()
    build.load(key)
    assert (tmp_path / "private").stat().st_mode & 0o077 == 0
    path = cache.folder(build.KIND, key.digest) / build.SOURCE
    whole = path.read_text()
    path.write_text("raise SystemExit('foreign code')\n")
    build.load.cache_clear()
    build.load(key)
    assert path.read_text() == whole
    build.load.cache_clear()


def test_import_costs_no_triton() -> None:
    """Asking what is supported on a machine without a GPU must not import Triton."""
    code = (
        "import sys, fa3_compile.lower.kernels.triton_forward; assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
