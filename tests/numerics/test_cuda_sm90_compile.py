"""`cuda_sm90` compiled for sm_90a where there is no GPU: no spills, no serialised products."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fa3_compile.lower import choose
from fa3_compile.lower.binaries import build_nvrtc
from fa3_compile.lower.choose import KernelBuildError, Problem
from fa3_compile.lower.kernels import cuda_sm90, cuda_sm90_backward, cuda_sm90_backward_keys
from fa3_compile.lower.kernels.cuda_sm90 import CudaSm90
from fa3_compile.lower.kernels.cuda_sm90_keys import keys_of, likely_layout
from fa3_compile.lower.render.cuda_terms import map_kind, mask_parts
from fa3_compile.lower.render.render_cuda import CudaKey, render
from fa3_compile.lower.tiles.config_sm90 import (
    DENSE_COLUMNS,
    Sm90Config,
    candidates,
    packing,
    packs,
    split_count,
    table,
)
from fa3_compile.report import RegionReport
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.text import FUNCTIONS
from tests.numerics.forms import BY_NAME, FORMS, inputs, shape_for

needs_nvrtc = pytest.mark.skipif(build_nvrtc.missing() is not None, reason="no cuda-bindings")

# Each hook of the variant once, and each head dim of the shipped table.
BUILT = [
    ("full", 64, 64),
    ("causal", 128, 128),
    ("window", 256, 256),
    ("softcap", 96, 96),
    ("sigmoid of s", 64, 64),
    ("alibi", 40, 40),
    ("dense bias", 128, 128),
    ("sink, filled", 192, 128),
    ("left padding", 128, 128),
    ("documents", 64, 64),
    ("dense mask", 80, 80),
    ("relative bias", 64, 64),
]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FA3_CACHE_DIR", str(tmp_path_factory.mktemp("fa3")))
        build_nvrtc.load.cache_clear()
        yield
        build_nvrtc.load.cache_clear()


def problem(name: str, dim: int, v_dim: int, dtype=torch.bfloat16) -> Problem:
    form = BY_NAME[name]
    shape = shape_for(form, dim, v_dim, 333, 421, 2)
    *_, aux = inputs(form, shape, dtype, "cpu")
    lengths = (shape.batch, shape.heads, shape.kv_heads, shape.q_len, shape.kv_len, dim, v_dim)
    dtypes = tuple(x.dtype for x in aux)
    device = torch.device("cuda:0")
    return Problem(form.spec(), dtype, device, (9, 0), *lengths, aux_dtypes=dtypes)


def keys(asked: Problem) -> list[CudaKey]:
    return keys_of(asked, likely_layout(asked))


@needs_nvrtc
@pytest.mark.parametrize(("name", "dim", "v_dim"), BUILT)
def test_builds_without_spills(name: str, dim: int, v_dim: int) -> None:
    _, built = build_nvrtc.load_first(keys(problem(name, dim, v_dim)))
    assert built.healthy, built.log


@needs_nvrtc
def test_places_outside_of_captured_tensors_of_every_type() -> None:
    kinds = {torch.bool: "bool", torch.int64: "int", torch.float16: "float", torch.float64: "float"}
    mask = " & ".join(f"(load({i}, kv - q + 9) > 0)" for i in range(len(kinds)))
    text = f"attention(score=s, mask={mask}, aux=[{', '.join(kinds.values())}])"
    spec = AttentionSpec.parse(text)
    asked = replace(problem("full", 64, 64), spec=spec, aux_dtypes=tuple(kinds))
    for key in (keys(asked)[0], cuda_sm90_backward_keys.likely_keys(asked)[0]):
        assert build_nvrtc.load(key).cubin


@needs_nvrtc
def test_the_report_names_the_file_with_a_kernels_source() -> None:
    asked = problem("full", 64, 64)
    path = CudaSm90().source(asked)
    assert Path(path).read_text().startswith(f"// {asked.spec}\n")
    region = RegionReport(0, "0/0", fused=True, kernel="cuda_sm90", kernel_source=path)
    assert ("source", path) in region.rows()


@pytest.mark.parametrize("form", FORMS, ids=lambda x: x.name)
def test_every_form_has_a_text(form) -> None:
    asked = problem(form.name, 64, 64)
    source = render(keys(asked)[0])
    assert source == render(keys(asked)[0])
    assert source.count("{") == source.count("}")
    assert source.startswith(f"// {asked.spec}\n")


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - {"load", "where", "uniform"}))
def test_every_function_has_a_text(name: str) -> None:
    arguments = {"min": "s, 3", "max": "s, 3", "pow": "s, 0.3"}
    bits = [x for x in FUNCTIONS if x.startswith(("bitwise", "left", "right"))]
    arguments |= dict.fromkeys(["floordiv", "mod", *bits], "q, 3")
    score = f"{name}({arguments.get(name, '0.1*s')})"
    spec = AttentionSpec.parse(f"attention(score=s + {score})")
    asked = replace(problem("full", 64, 64), spec=spec)
    assert CudaSm90().supports(asked) is None
    assert cuda_sm90_backward.supports_backward(asked) is None


@pytest.mark.parametrize("dim", range(8, 257, 8))
def test_every_head_dim_has_tiles_that_fit(dim: int) -> None:
    for q_len in (1, 100, 4096):
        for plain in (True, False):
            for dense in (0, 2, 4):
                found = candidates(dim, dim, q_len, True, plain, dense)
                assert found or dense, (dim, q_len, plain)
                assert all(x.block_m <= max(128, q_len) for x in found)


def test_tiles_of_the_table_fit() -> None:
    for dim, row in table().items():
        assert list(row) == ["full", "rows", "scores", "masks", "dense", "wide dense"]
        for column, tiles in row.items():
            dense = {name: x for x, name in DENSE_COLUMNS.items()}.get(column, 0)
            for tile in tiles:
                assert Sm90Config(*tile).fits(dim, dim, dense), (dim, column, tile)


def test_packed_tiles_hold_every_row_once() -> None:
    for group in (*range(1, 70), 96, 128, 130):
        for q_len in range(1, 65):
            found = packing(group, q_len)
            assert found.heads * found.rows <= 64
            assert (found.chunks - 1) * found.heads < group <= found.chunks * found.heads
            blocks = -(-q_len // found.rows)
            assert packs(group, q_len) == (group > 1 and blocks * found.chunks < group)
    assert not packs(8, 65) and not packs(8, 0)


@pytest.mark.parametrize(
    ("tiles", "blocks", "expected"),
    [(8, 256, 16), (16, 256, 8), (128, 256, 1), (256, 256, 1), (192, 256, 2), (8, 2, 1), (1, 4, 1),
     (1, 512, 132), (10**6, 10**6, 1)],
)  # fmt: skip
def test_keys_are_dealt_out_where_tiles_do_not_fill_the_card(tiles, blocks, expected) -> None:
    assert split_count(tiles, blocks, 132) == expected


def test_a_growing_cache_takes_one_kernel() -> None:
    asked = replace(problem("full", 128, 128), q_len=1, batch=1, heads=32, kv_heads=4)
    found = [keys(replace(asked, kv_len=n)) for n in (1, 100, 4096, 100_000)]
    assert all(x == found[0] for x in found)
    assert found[0][0].config.packed and found[0][0].config.split


def test_long_keys_are_dealt_out_to_few_large_tiles() -> None:
    asked = replace(problem("bottom right", 128, 128), q_len=512, kv_len=32768, batch=1, heads=8)
    assert keys(asked)[0].config.split
    assert not keys(replace(asked, kv_len=512))[0].config.split
    assert not keys(replace(asked, batch=32))[0].config.split


def test_masks_of_a_head_are_not_packed() -> None:
    spec = AttentionSpec.parse("attention(score=s, mask=(kv - load(0, h) <= 0), aux=[int])")
    asked = replace(problem("full", 64, 64), q_len=1, spec=spec, aux_dtypes=(torch.int64,))
    assert not keys(asked)[0].config.packed
    assert keys(replace(asked, spec=AttentionSpec.parse("attention(score=s)"), aux_dtypes=()))[
        0
    ].config.packed


@pytest.mark.parametrize(
    ("form", "kind"),
    [("static cache", ""), ("static cache, window", ""), ("sequence ends", ""),
     ("static cache, rows", "Interval"), ("static cache, left padding", "Interval")],
)  # fmt: skip
def test_an_integer_of_a_head_bounds_the_keys(form: str, kind: str) -> None:
    assert map_kind(BY_NAME[form].spec()) == kind


@pytest.mark.parametrize(
    ("form", "interval", "column", "element"),
    [
        ("window", "(Max(0, q - 70), Min(Skv, q + 1))", "True", "True"),
        ("left padding", "(0, Min(Skv, q + 1))", "Ne(load(0, b, kv), 0)", "True"),
        ("documents, full", "None", "True", "Eq(load(0, b, q), load(0, b, kv))"),
        ("not itself", "None", "True", "Ne(q, kv)"),
    ],
)
def test_a_mask_comes_apart(form: str, interval: str, column: str, element: str) -> None:
    parts = mask_parts(BY_NAME[form].spec().mask)
    assert (str(parts.interval), str(parts.column)) == (interval, column)
    assert str(parts.element) == element


@needs_nvrtc
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "float32"),
        ({"dim": 264}, "head dim is 264"),
        ({"v_dim": 12}, "value head dim is 12"),
        ({"device": torch.device("cpu"), "capability": None}, "this is cpu"),
        ({"capability": (8, 0)}, "(8, 0)"),
        ({"capability": (10, 0)}, "(10, 0)"),
        ({"aux_dtypes": (torch.complex64,)}, "complex64"),
        ({"batch": 70000}, "65535"),
    ],
    ids=lambda x: str(x)[:24],
)
def test_says_what_it_does_not_take(change, reason: str) -> None:
    asked = problem("causal", 64, 64)
    assert CudaSm90().supports(asked) is None
    said = CudaSm90().supports(replace(asked, **change))
    assert said is not None and reason in said


def test_says_so_without_cuda_bindings(monkeypatch) -> None:
    monkeypatch.setattr(cuda_sm90, "missing", lambda: "cuda-bindings is not installed")
    said = CudaSm90().supports(problem("causal", 64, 64))
    assert said == "cuda-bindings is not installed"


def test_the_next_family_runs_where_it_cannot_be_built() -> None:
    asked = problem("causal", 64, 64)
    assert choose.next_after(CudaSm90(), asked, ("cuda_sm90", "reference")).name == "reference"
    with pytest.raises(KernelBuildError, match="no tile fits"):
        build_nvrtc.load_first([])


@pytest.mark.parametrize(
    ("name", "dim", "processors", "count"),
    [("documents", 64, 4, 2), ("documents", 64, 1, 1), ("documents", 128, 4, 1),
     ("left padding", 64, 4, 1)],
)  # fmt: skip
def test_two_tiles_are_built_at_once_where_the_first_may_spill(
    name, dim, processors, count, monkeypatch
) -> None:
    asked, built = problem(name, dim, dim), []

    def load(key) -> build_nvrtc.Built:
        built.append(key.config)
        return build_nvrtc.Built(b"", "", 168, 0, False)

    monkeypatch.setattr(build_nvrtc, "load", load)
    monkeypatch.setattr("os.cpu_count", lambda: processors)
    CudaSm90().prepare(asked)
    assert {*built} == {x.config for x in keys(asked)[:count]}


@needs_nvrtc
def test_an_entry_keeps_its_source_and_a_damaged_one_is_rebuilt(caplog) -> None:
    key = CudaKey(AttentionSpec(), "Fp16", 64, 64, Sm90Config(64, 64))
    build_nvrtc.load.cache_clear()
    with caplog.at_level(logging.DEBUG, "fa3_compile"):
        built = build_nvrtc.load(key)
    [said] = caplog.messages
    source = Path(said.removeprefix(f"{key.spec}: "))
    assert source.read_text() == key.source()
    folder = source.parent
    assert {"kernel.cubin", "log", "config.json"} <= {x.name for x in folder.iterdir()}
    (folder / "kernel.cubin").write_bytes(b"foreign code")
    build_nvrtc.load.cache_clear()
    assert build_nvrtc.load(key).cubin == built.cubin


@needs_nvrtc
def test_a_source_that_does_not_compile_says_why() -> None:
    with pytest.raises(build_nvrtc.BuildError, match="nonsense") as found:
        build_nvrtc.build("nonsense here;", {})
    assert found.value.source == "nonsense here;"
