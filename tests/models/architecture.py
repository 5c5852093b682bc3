"""What an entry of the model zoo is: how it is built, and its inputs."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from tests.models.inputs import Inputs, Padding


@dataclass(frozen=True)
class Architecture:
    """One entry of the zoo.

    name: the `model_type` in transformers.
    regions: attention regions in one forward pass, counted over all layers.
    config: the fields that differ from the configuration class's defaults.
    padding: the side on which people pad a batch for this model.
    make_inputs: `(batch, length, padding) -> inputs` on the CPU, in float32 and int64.
    gain: see `sharpen`.
    model_class: "module.Class" under transformers.models, for parts of models that AutoModel does
        not know by name.
    declined: why no region of it is fused, as "stage: code"; "" where all are.
    """

    name: str
    regions: int
    config: Mapping[str, Any]
    padding: Padding
    make_inputs: Callable[[int, int, Padding], Inputs] = field(repr=False)
    gain: float = 1.5
    model_class: str = ""
    declined: str = ""

    def make(self, seed: int = 0) -> nn.Module:
        """The base model in eval mode, float32, on the CPU; equal for equal seeds."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return sharpen(self._build(), self.gain).eval()

    def _build(self) -> nn.Module:
        if not self.model_class:
            config = AutoConfig.for_model(self.name, **{"use_cache": False, **self.config})
            return AutoModel.from_config(config, attn_implementation="eager")
        module, name = self.model_class.split(".")
        module = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
        made = getattr(module, name)
        return made._from_config(made.config_class(**self.config), attn_implementation="eager")

    def inputs(
        self,
        batch: int = 2,
        length: int = 24,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        padding: Padding | None = None,
    ) -> Inputs:
        """Keyword arguments for the model, without labels.

        `length` is the number of tokens (of a decoder's own tokens too, less a few, so that cross
        attention is not square); image models ignore it. `padding="none"` leaves the mask out.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(length)
            made = self.make_inputs(batch, length, padding or self.padding)
        return {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in made.items()
        }


def sharpen(model: nn.Module, gain: float) -> nn.Module:
    """Give every parameter values under which a wrong attention changes the output.

    The usual initialisation (std 0.02, zero biases) leaves the scores of so small a model near
    zero: softmax is then uniform, and a wrong scale, bias or softcap passes every comparison.
    With a gain of 1.5 the scores of most models here have a standard deviation of about 2.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if parameter.dim() > 1:
                parameter.copy_(noise * gain / math.sqrt(parameter[0].numel()))
            elif name.endswith("sinks"):
                parameter.copy_(noise)
            else:
                parameter.add_(0.1 * noise)
    return model
