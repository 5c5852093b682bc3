"""Thirty Hugging Face architectures through the backend: every attention fused, eager's numbers.

`kernels="reference"` rewrites on any device and runs the rewritten attention in torch, so this
tests everything except the kernels.
"""

from __future__ import annotations

import os

import pytest
import torch

from fa3_compile.testing import assert_matches_eager
from tests.graph.harness import rewrite_only
from tests.models.architecture import Architecture
from tests.models.zoo import ARCHITECTURES, BY_NAME

# Inductor's C++ for everything else is compiled scalar and unoptimised: 5 s a model, not 15.
REFERENCE = {"kernels": "reference", "cpp.simdlen": 1, "aot_inductor.debug_compile": True}

# `if torch.rand([]) < self.layerdrop` in train() breaks the graph at every layer; Dynamo then
# compiles a layer once and runs it for all.
LAYER_DROP = {"opt", "bart", "whisper"}

# No mask argument: decoders then derive packed documents from the positions, others drop the mask.
UNPADDED = ("llama", "gemma2", "gpt_neo", "bloom", "falcon", "mpt", "bert", "modernbert", "t5")

# Through Inductor too; the others run their rewritten graph as it is, a fifth of the time.
# FA3_ALL_MODELS=1 takes every model, in every test, through Inductor (about 15 minutes).
THROUGH_INDUCTOR = {"llama", "gemma2", "bloom", "bert", "gpt2", "gpt_oss"}


def backend_for(name: str):
    everything = os.environ.get("FA3_ALL_MODELS") == "1"
    return "fa3" if everything or name in THROUGH_INDUCTOR else rewrite_only


every_architecture = pytest.mark.parametrize(
    "architecture", ARCHITECTURES, ids=lambda architecture: architecture.name
)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def assert_all_fused(report, architecture: Architecture) -> None:
    left_alone = [region.reason for region in report.regions if not region.fused]
    assert not left_alone, f"{architecture.name}: regions left alone: {left_alone}"
    assert len(report.regions) == architecture.regions


@every_architecture
def test_inference(architecture: Architecture) -> None:
    report = assert_matches_eager(
        architecture.make(),
        backend=backend_for(architecture.name),
        options=REFERENCE,
        **architecture.inputs(batch=2, length=24),
    )
    assert_all_fused(report, architecture)


@pytest.mark.parametrize("name", UNPADDED)
def test_inference_without_a_padding_mask(name: str) -> None:
    architecture = BY_NAME[name]
    report = assert_matches_eager(
        architecture.make(),
        backend=rewrite_only,
        options=REFERENCE,
        **architecture.inputs(length=24, padding="none"),
    )
    assert_all_fused(report, architecture)


@every_architecture
def test_training(architecture: Architecture) -> None:
    model = architecture.make()
    if architecture.name not in LAYER_DROP:
        model.train()
    report = assert_matches_eager(
        model,
        backend=backend_for(architecture.name),
        options=REFERENCE,
        training=True,
        **architecture.inputs(batch=2, length=24),
    )
    assert_all_fused(report, architecture)
