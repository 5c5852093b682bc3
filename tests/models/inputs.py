"""Inputs for the models of the zoo: `(batch, length, padding) -> keyword arguments`, no labels.

Tokens are int64 `[batch, length]`; audio and pixels are float32. Everything is made on the CPU.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Padding = Literal["left", "right", "none"]
Inputs = dict[str, Tensor]

VOCABULARY = 96
FIRST_ORDINARY_TOKEN = 4  # 0..3 are padding, begin, end and mask tokens
MEL_BINS, AUDIO_LENGTH = 8, 24  # Whisper's encoder takes one fixed length
IMAGE_SIZE, PATCH_SIZE = 24, 8
AUDIO_FRAMES = 20


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(FIRST_ORDINARY_TOKEN, VOCABULARY, (batch, length))


def padding_mask(batch: int, length: int, padding: Padding) -> Tensor:
    """1 for a token, 0 for padding; row 0 is full, each later row is a quarter shorter."""
    kept = torch.tensor([max(1, length - row * length // 4) for row in range(batch)])
    position = torch.arange(length)
    if padding == "left":
        position = position.flip(0)
    return (position < kept[:, None]).long()


def text(batch: int, length: int, padding: Padding) -> Inputs:
    made = {"input_ids": tokens(batch, length)}
    if padding != "none":
        made["attention_mask"] = padding_mask(batch, length, padding)
    return made


def encoder_decoder(batch: int, length: int, padding: Padding) -> Inputs:
    made = text(batch, length, padding)
    made["decoder_input_ids"] = tokens(batch, length - 7)
    if padding != "none":
        made["decoder_attention_mask"] = padding_mask(batch, length - 7, padding)
    return made


def speech(batch: int, length: int, padding: Padding) -> Inputs:
    del padding  # Whisper pads the audio with silence to a fixed length and masks nothing
    return {
        "input_features": torch.randn(batch, MEL_BINS, 2 * AUDIO_LENGTH),
        "decoder_input_ids": tokens(batch, length - 7),
    }


def image(batch: int, length: int, padding: Padding) -> Inputs:
    del length, padding
    return {"pixel_values": torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE)}


def text_and_image(batch: int, length: int, padding: Padding) -> Inputs:
    return {**text(batch, length, padding), **image(batch, length, padding)}


def squared_patches(batch: int, length: int, padding: Padding) -> Inputs:
    """An image of 4 x 4 patches."""
    del length, padding
    return {"pixel_values": torch.randn(batch, 3, 4 * PATCH_SIZE, 4 * PATCH_SIZE)}


def video(batch: int, length: int, padding: Padding) -> Inputs:
    del length, padding
    return {"pixel_values_videos": torch.randn(batch, 2, 3, IMAGE_SIZE, IMAGE_SIZE)}


def latents(batch: int, length: int, padding: Padding) -> Inputs:
    return {
        "context": torch.randn(batch, length, 64),
        "attention_mask": padding_mask(batch, length, padding),
    }


def time_series(batch: int, length: int, padding: Padding) -> Inputs:
    """Eight numbers a token, the first two tokens of row 1 padding."""
    del padding
    padded = torch.zeros(batch, 8 * length)
    padded[1:, :16] = 1
    return {
        "past_values": torch.randn(batch, 8 * length),
        "past_values_padding": padded,
        "freq": torch.zeros(batch, 1, dtype=torch.long),
    }


def sound(batch: int, length: int, padding: Padding) -> Inputs:
    del padding
    frames = 4 * length
    kept = torch.tensor([frames - 12 * row for row in range(batch)])
    return {
        "hidden_states": torch.randn(batch, frames, MEL_BINS),
        "mask": torch.arange(frames) < kept[:, None],
    }


def waveform(batch: int, length: int, padding: Padding) -> Inputs:
    del padding
    return {"input_values": torch.randn(batch, 16 * length + 8)}


def steps(batch: int, length: int, padding: Padding) -> Inputs:
    del length, padding
    return {"input_values": torch.randn(batch, AUDIO_FRAMES, MEL_BINS)}


def tokens_of_an_image(batch: int, length: int, padding: Padding) -> Inputs:
    """Words with their boxes on a page."""
    corner = torch.randint(0, 60, (batch, length, 2))
    return {**text(batch, length, padding), "bbox": torch.cat([corner, corner + 20], -1)}
