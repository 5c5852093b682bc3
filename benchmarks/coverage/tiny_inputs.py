"""Inputs for a model of transformers, guessed from its signature and configuration."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.models.inputs import padding_mask

BATCH, LENGTH, DECODED = 2, 24, 17
NESTED = ("vision_config", "text_config", "backbone_config", "audio_config", "encoder")


def candidates(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Keyword arguments that the model may take, the likeliest first; text is padded."""
    config: Any = model.config
    parameters = inspect.signature(model.forward).parameters
    base = _plain(model, config, parameters)
    yield base
    if "grid_thw" in parameters:
        yield from _patches(config)
    if "pixel_values" in parameters:
        yield {**base, "pixel_values": _image(config)}
    if "input_features" in parameters:
        mel = _get(config, 8, "num_mel_bins", "feature_size", "n_mels", "input_dim")
        for shape in ((BATCH, 96, mel), (BATCH, mel, 96)):
            features = {**base, "input_features": torch.randn(shape)}
            yield features
            for name in ("attention_mask", "input_features_mask"):
                if name in parameters:
                    yield {**features, name: padding_mask(BATCH, 96, "right")}
            if "input_ids" in parameters:
                yield {**features, "input_ids": _tokens(config, LENGTH)}
    if "input_values" in parameters:
        yield {**base, "input_values": torch.randn(BATCH, 1600)}
        yield {**base, "input_values": torch.randn(BATCH, 1, 1600)}
    if "bbox" in parameters:
        corner = torch.randint(0, 60, (BATCH, LENGTH, 2))
        yield {**base, "bbox": torch.cat([corner, corner + 20], -1)}


def _plain(model: nn.Module, config: Any, parameters) -> dict[str, Tensor]:
    main = getattr(model, "main_input_name", "input_ids")
    needed = [
        name
        for name, x in parameters.items()
        if x.default is inspect.Parameter.empty and x.kind is x.POSITIONAL_OR_KEYWORD
    ]
    made: dict[str, Tensor] = {}
    if "input_ids" in parameters and main in ("input_ids", "pixel_values"):
        made["input_ids"] = _tokens(config, LENGTH)
        if "attention_mask" in parameters:
            side = "left" if _decodes(model) else "right"
            made["attention_mask"] = padding_mask(BATCH, LENGTH, side)
    if "decoder_input_ids" in parameters:
        made["decoder_input_ids"] = _tokens(config, DECODED)
        if "decoder_attention_mask" in parameters:
            made["decoder_attention_mask"] = padding_mask(BATCH, DECODED, "right")
    if "pixel_values" in parameters and (main == "pixel_values" or "pixel_values" in needed):
        made["pixel_values"] = _image(config)
    if main == "pixel_values_videos":
        frames = _get(config, 2, "num_frames", "frames_per_clip")
        made[main] = torch.randn(BATCH, frames, *_image(config).shape[1:])
    if main == "input_values":
        made[main] = torch.randn(BATCH, 1600)
        if hasattr(config, "frequency_stride"):
            made[main] = torch.randn(BATCH, config.max_length, config.num_mel_bins)
    if main == "input_features":
        mel = _get(config, 8, "num_mel_bins", "feature_size", "n_mels")
        made[main] = torch.randn(BATCH, mel, 2 * _get(config, 24, "max_source_positions"))
    for name in {"inputs_embeds", "hidden_states"}.intersection(needed) - set(made):
        made[name] = torch.randn(BATCH, LENGTH, _get(config, 64, "hidden_size", "d_model"))
    return made


def _patches(config: Any) -> Iterator[dict[str, Tensor]]:
    """Two images, of 4 x 4 and 2 x 4 patches, in one sequence."""
    grid = torch.tensor([[1, 4, 4], [1, 2, 4]])
    side, channels = config.patch_size, _get(config, 3, "in_channels", "num_channels")
    width = channels * getattr(config, "temporal_patch_size", 1) * side * side
    for name in ("hidden_states", "pixel_values"):
        yield {name: torch.randn(24, width), "grid_thw": grid}
    yield {"pixel_values": torch.randn(24, channels, side, side), "grid_thw": grid}


def _get(config: Any, default: Any, *names: str) -> Any:
    """The first of the fields that the configuration, or one inside of it, has."""
    for part in (config, *(getattr(config, name, None) for name in NESTED)):
        for name in names:
            if getattr(part, name, None) is not None:
                return getattr(part, name)
    return default


def _tokens(config: Any, length: int) -> Tensor:
    return torch.randint(4, min(_get(config, 96, "vocab_size") or 96, 88), (BATCH, length))


def _image(config: Any) -> Tensor:
    size = _get(config, 32, "image_size", "img_size", "crop_size")
    size = [size["height"], size["width"]] if isinstance(size, dict) else size
    size = list(size) if isinstance(size, (list, tuple)) else [size, size]
    channels = _get(config, 3, "num_channels", "in_channels", "in_chans")
    return torch.randn(BATCH, channels, *size[-2:])


def _decodes(model: nn.Module) -> bool:
    text = inspect.getsource(sys.modules[type(model).__module__])
    return "create_causal_mask" in text and not getattr(model.config, "is_encoder_decoder", False)
