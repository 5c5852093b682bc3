"""Hugging Face architectures through the backend: every attention fused, eager's numbers.

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
from tests.models.eager_bodies import eager_bodies, module_of
from tests.models.zoo import ARCHITECTURES, BY_NAME
from tests.models.zoo_text import TEXT
from tests.models.zoo_vision import VISION_AND_SOUND

EVERYTHING = os.environ.get("FA3_ALL_MODELS") == "1"
WIDER = (*TEXT, *VISION_AND_SOUND)

REFERENCE = {"kernels": "reference"}

# `if torch.rand([]) < self.layerdrop` in train() breaks the graph at every layer; Dynamo then
# compiles a layer once and runs it for all.
LAYER_DROP = {"opt", "bart", "whisper"}

# No mask argument: decoders then derive packed documents from the positions, others drop the mask.
UNPADDED = ("llama", "gemma2", "gpt_neo", "bloom", "falcon", "mpt", "bert", "modernbert", "t5")

# Through Inductor too, with gradients or without; the others run their rewritten graph as it is, a
# fifth of the time. FA3_ALL_MODELS=1 takes every model, in every test, through Inductor (about 15
# minutes).
TRAINED_BY_INDUCTOR = {"llama", "gpt_oss"}
RUN_BY_INDUCTOR = {"bloom", "bert", "gpt2"}


def backend(by_inductor: bool):
    return "fa3" if EVERYTHING or by_inductor else rewrite_only


def each(architectures: tuple[Architecture, ...]):
    return pytest.mark.parametrize("architecture", architectures, ids=lambda x: x.name)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def assert_all_fused(report, architecture: Architecture) -> None:
    became = {"" if x.fused else f"{x.stage}: {x.code}" for x in report.regions}
    assert became == {architecture.declined}, f"{architecture.name}: {report}"
    assert len(report.regions) == architecture.regions


@each(ARCHITECTURES)
def test_inference(architecture: Architecture) -> None:
    report = assert_matches_eager(
        architecture.make(),
        backend=backend(architecture.name in RUN_BY_INDUCTOR),
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


@each(ARCHITECTURES)
def test_training(architecture: Architecture) -> None:
    model = architecture.make()
    if architecture.name not in LAYER_DROP:
        model.train()
    report = assert_matches_eager(
        model,
        backend=backend(architecture.name in TRAINED_BY_INDUCTOR),
        options=REFERENCE,
        training=True,
        **architecture.inputs(batch=2, length=24),
    )
    assert_all_fused(report, architecture)


@each(WIDER if EVERYTHING else WIDER[::3])
def test_wider(architecture: Architecture) -> None:
    """Outputs and gradients at once, without train(): layer drop would break the graphs."""
    report = assert_matches_eager(
        architecture.make(),
        backend=backend(False),
        options=REFERENCE,
        training=True,
        **architecture.inputs(batch=2, length=24),
    )
    assert_all_fused(report, architecture)


@pytest.mark.skipif(not EVERYTHING, reason="FA3_ALL_MODELS=1 asks for it; test_wider has a third")
@each(WIDER)
def test_wider_inference(architecture: Architecture) -> None:
    report = assert_matches_eager(
        architecture.make(),
        backend="fa3",
        options=REFERENCE,
        **architecture.inputs(batch=2, length=24),
    )
    assert_all_fused(report, architecture)


def test_every_body_of_eager_attention_is_in_the_zoo() -> None:
    """The texts of `eager_attention_forward` in transformers, against those that the zoo runs."""
    zoo = {module_of(x) for x in (*ARCHITECTURES, *WIDER)}
    missing = [sorted(modules) for modules in eager_bodies().values() if not modules & zoo]
    assert not missing, f"no model in the zoo runs the attention of {missing}"
