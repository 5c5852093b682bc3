"""The ptxas for Hopper: products read what they should, in the machine code."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton import knobs  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402

from fa3_compile.lower.binaries.assembler import SOUND, sound_assembler, version  # noqa: E402
from fa3_compile.lower.choose import KernelBuildError  # noqa: E402
from fa3_compile.lower.tiles import tune_forward  # noqa: E402
from tests.numerics.sass import instructions, wrong_descriptors  # noqa: E402
from tests.numerics.test_triton_compile import compiled, own_caches, problem  # noqa: E402, F401

SIGMOID = "attention(normalize=none, score=sigmoid(0.1*s - 6.0))"


def code(form: str, dim: int, folder: Path) -> list[str]:
    """With rows of k and v that are no multiple of 32 bytes: panels go through registers."""
    asked = problem(form, dim, 90, length=512)
    config = replace(tune_forward.table_config(asked), num_stages=1)
    kernel = compiled(asked, config, odd=("q_stride_h", "k_stride_", "v_stride_"))
    return instructions(kernel.asm["cubin"], folder)


@pytest.mark.parametrize("dim", [40, 80, 96])
def test_products_read_what_they_should(dim: int, tmp_path: Path) -> None:
    assert wrong_descriptors(code(SIGMOID, dim, tmp_path)) == []


@pytest.mark.skipif(version(get_ptxas(90)) >= SOUND, reason="Triton's own ptxas is sound")
def test_what_is_wrong_is_found(tmp_path: Path, monkeypatch) -> None:
    """Seen wrong on an H100: columns 64 to 95."""
    monkeypatch.setattr("tests.numerics.assembled.sound_assembler", nullcontext)
    wrong = wrong_descriptors(code(SIGMOID, 96, tmp_path))
    assert any("64x32x16" in x for x in wrong)


def test_other_cards_keep_their_ptxas() -> None:
    before = knobs.nvidia.ptxas.path
    with sound_assembler(80):
        assert knobs.nvidia.ptxas.path == before
    with sound_assembler(90):
        assert version(get_ptxas(90)) >= SOUND
    assert knobs.nvidia.ptxas.path == before


@pytest.mark.skipif(version(get_ptxas(90)) >= SOUND, reason="Triton's own ptxas is sound")
def test_without_a_sound_one_nothing_is_built(monkeypatch) -> None:
    monkeypatch.setattr("fa3_compile.lower.binaries.assembler.version", lambda tool: (12, 8))
    with pytest.raises(KernelBuildError, match="TRITON_PTXAS_PATH"), sound_assembler(90):
        pass
