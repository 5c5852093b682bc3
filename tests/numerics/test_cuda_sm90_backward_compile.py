"""The backward of `cuda_sm90` compiled for sm_90a where there is no GPU: no spills, no serialised
products; and what it leaves to other families."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fa3_compile.lower.binaries import build_nvrtc
from fa3_compile.lower.choose import Problem
from fa3_compile.lower.kernels import cuda_sm90_backward as backward
from fa3_compile.lower.kernels.cuda_sm90_backward_keys import TALL_SPILLS, likely_keys, load_best
from fa3_compile.lower.render.render_cuda_backward import render_backward, two_weights
from fa3_compile.lower.tiles.config_sm90_backward import candidates
from fa3_compile.spec.attention import AttentionSpec
from tests.numerics.forms import FORMS
from tests.numerics.test_cuda_sm90_compile import needs_nvrtc, own_cache, problem

__all__ = ["own_cache"]

# Each hook of the variant, each structure of kernel and each way of listing query blocks.
BUILT = [
    ("causal", 128, 128),
    ("causal", 256, 256),
    ("window", 64, 64),
    ("softcap", 96, 96),
    ("left padding", 128, 64),
]
# What these spill in bytes, and no more: their elements read 64-bit addresses or draw numbers.
# (form, which of the candidates at head dim 128, bytes; the first is 68 by the NVRTC of torch 2.15)
SPILLING = [
    ("documents", 6, 70),
    ("dense bias", 2, 40),
    ("dense mask", 0, 40),
    ("dropout, causal", 2, 80),
]


def training(name: str, dim: int, v_dim: int, needs: tuple[bool, ...] = ()) -> Problem:
    asked = problem(name, dim, v_dim)
    needs = needs or (False,) * len(asked.aux_dtypes)
    return replace(asked, kv_heads=asked.heads, needs_grad=True, aux_needs_grad=needs)


@needs_nvrtc
@pytest.mark.parametrize(("name", "dim", "v_dim"), BUILT)
def test_builds_without_spills(name: str, dim: int, v_dim: int) -> None:
    key, built = load_best(likely_keys(training(name, dim, v_dim)))
    allowed = TALL_SPILLS if key.config.block_m == 128 else 120 if key.config.beside else 0
    assert not built.serialised and built.spill_bytes <= allowed, built.log


@needs_nvrtc
@pytest.mark.parametrize(("name", "which", "allowed"), SPILLING)
def test_spills_little(name: str, which: int, allowed: int) -> None:
    built = build_nvrtc.load(likely_keys(training(name, 128, 128))[which])
    assert not built.serialised and built.spill_bytes <= allowed, built.log


def test_where_dq_is_rounded_by_the_main_kernel() -> None:
    for name, beside in (
        ("full", True), ("causal", False), ("prefix", False), ("window", True), ("documents", True),
        ("dense mask", True), ("alibi", False), ("alibi, no mask", True), ("dense bias", False),
    ):  # fmt: skip
        keys = likely_keys(training(name, 128, 128))
        assert {x.config.finishes for x in keys} == {beside}, name
        assert ("query_gradient(const" in keys[0].source()) == (not beside)
    # Of the 128 columns of a tile of 64 queries half are none of Q's; nor are warps' 40 whole pairs.
    for dim, found in ((64, {True, False}), (96, {False}), (40, {False}), (192, {True})):
        assert {x.config.finishes for x in likely_keys(training("full", dim, dim))} == found


def test_which_kernels_work_for_other_heads_beside() -> None:
    for name, dim, beside in (
        ("causal", 256, True), ("prefix", 136, True), ("alibi", 192, True), ("causal", 128, False),
        ("full", 256, False), ("window", 256, False), ("documents", 256, False),
        ("dense bias", 256, False), ("left padding", 256, False),
    ):  # fmt: skip
        keys = likely_keys(training(name, dim, dim))
        assert {x.config.beside for x in keys} == {beside}, name
        assert ("/*Beside=*/true" in keys[0].source()) == beside


def test_what_elements_are_asked_is_found_as_bits() -> None:
    for name, hooks in (("documents", "bool mask"), ("dropout, causal", "bool kept")):
        configs = [x.config for x in likely_keys(training(name, 128, 128))]
        half = len(configs) // 2
        assert [x.bits for x in configs] == [True] * half + [False] * half
        assert hooks in likely_keys(training(name, 128, 128))[0].source()
    # Neither intervals of keys nor factors of any size are bits.
    for name in ("causal", "window", "left padding", "weight by row and head"):
        assert not any(x.config.bits for x in likely_keys(training(name, 128, 128)))


@pytest.mark.parametrize("weight", ["where(uniform(load(0), b, h, q, kv) < 0.1, 0, 2)",
                                    "2*where(q < kv, 1, 0.5)"])  # fmt: skip
def test_two_weights(weight: str) -> None:
    spec = AttentionSpec.parse(f"attention(score=s, weight={weight}, aux=[int])")
    found = two_weights(spec.weight)
    assert found is not None and found[1:] == ((0.0, 2.0) if "load" in weight else (2.0, 1.0))
    other = AttentionSpec.parse(
        "attention(score=s, weight=where(q < kv, 0, load(0, q)), aux=[float])"
    )
    assert two_weights(other.weight) is None and two_weights(None) is None


@pytest.mark.parametrize("form", FORMS, ids=lambda x: x.name)
def test_every_form_has_a_text_or_a_reason(form) -> None:
    asked = training(form.name, 64, 64)
    reason = backward.supports_backward(asked)
    if reason is None:
        source = render_backward(likely_keys(asked)[0])
        assert source.count("{") == source.count("}")
        assert source.startswith(f"// backward of {asked.spec}\n")
    else:
        assert "row without a key" in reason


@pytest.mark.parametrize("dim", range(8, 257, 8))
def test_every_head_dim_has_a_tile_that_fits(dim: int) -> None:
    assert any(x.fits(dim, dim, False) for x in candidates(dim, dim, True, False))
    assert all(sum(x.sum_columns(dim)) >= dim for x in candidates(dim, dim, True, False))


@pytest.mark.parametrize(
    ("form", "needs", "how"),
    [
        ("dense bias", (False,), ""),
        ("dense bias", (True,), "store"),
        ("dense bias, one batch", (True,), "add"),
    ],
)
def test_gradient_of_a_dense_bias(form: str, needs: tuple[bool, ...], how: str) -> None:
    asked = training(form, 128, 128, needs)
    assert backward.supports_backward(asked) is None
    keys = likely_keys(asked)
    assert {x.tile_gradient for x in keys} == {how}
    source = render_backward(keys[0])
    assert ("kTileGradient = true" in source) == bool(how)
    assert ("kTileSum = true" in source) == (how == "add")


@pytest.mark.parametrize(
    ("form", "change", "reason"),
    [
        ("causal", {"deterministic": True}, "no fixed order"),
        ("alibi", {"aux_needs_grad": (True,)}, "no gradient of captured tensor 0"),
        ("dense bias, fp32", {"aux_needs_grad": (True,)}, "float32"),
        ("dense bias, one batch", {"aux_needs_grad": (True,), "batch": 8}, "a sum of 8 in 16 bits"),
        ("dense bias, transposed", {"aux_needs_grad": (True,)}, None),
        ("window, added", {}, "row without a key"),
        ("dropout", {"dim": 192}, "head dims up to 128"),
        ("sink", {"aux_needs_grad": (True,)}, None),
        ("causal", {"dim": 64, "v_dim": 192}, "no head dim 64 with 192"),
    ],
)
def test_says_what_it_does_not_take(form: str, change: dict, reason: str | None) -> None:
    said = backward.supports_backward(replace(training(form, 128, 128), **change))
    assert said is None if reason is None else said is not None and reason in said


def test_deterministic_algorithms_leave_it_to_others() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        said = backward.supports_backward(training("causal", 128, 128))
    finally:
        torch.use_deterministic_algorithms(False)
    assert said is not None and "no fixed order" in said


def test_a_tall_tile_may_spill_a_little(monkeypatch) -> None:
    """Measured on an H100: 128 queries with a few spills are faster than 64 without."""
    keys = likely_keys(training("softcap", 64, 64))
    tall = [x for x in keys if x.config.block_m == 128]
    spilled = dict.fromkeys(keys, 0) | dict.fromkeys(tall, 216)

    def load(key):
        return build_nvrtc.Built(b"", "", registers=240, spill_bytes=spilled[key], serialised=False)

    monkeypatch.setattr(build_nvrtc, "load", load)
    assert load_best(keys)[0] == tall[0]
    spilled[tall[1]] = 72
    assert load_best(keys)[0] == tall[1]
    spilled |= dict.fromkeys(tall, TALL_SPILLS + 4)
    assert load_best(keys)[0].config.block_m == 64
