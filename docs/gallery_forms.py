"""The attention of the gallery page, one function a form, written as people write it.

Each takes q, k, v [B, H, S, D] and the tensors it names by annotation in `CAPTURED`.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return F.softmax(scores, dim=-1) @ v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return F.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1) @ v


def sliding_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    at = torch.arange(q.shape[-2], device=q.device)
    distance = at[:, None] - at[None, :]
    seen = (distance >= 0) & (distance < 256)
    return F.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1) @ v


def prefix_lm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    at = torch.arange(q.shape[-2], device=q.device)
    seen = (at[None, :] <= at[:, None]) | (at[None, :] < 300)
    return F.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1) @ v


def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    at = torch.arange(q.shape[-2], device=q.device)
    seen = (at[:, None] // 256 == at[None, :] // 256) & (at[None, :] <= at[:, None])
    return F.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1) @ v


def dilated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    at = torch.arange(q.shape[-2], device=q.device)
    distance = at[:, None] - at[None, :]
    seen = (distance >= 0) & (distance % 512 < 128)
    return F.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1) @ v


def documents(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    same = document[:, None, :, None] == document[:, None, None, :]
    seen = same & torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return F.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1) @ v


def padding(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    hidden = (1.0 - kept[:, None, None, :].float()) * torch.finfo(torch.float32).min
    return F.softmax(scores + hidden, dim=-1) @ v


def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    scores = 50.0 * torch.tanh(scores / 50.0)
    seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return F.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1) @ v


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    at = torch.arange(q.shape[-2], device=q.device)
    scores = scores + slopes[:, None, None] * (at[None, :] - at[:, None])
    seen = at[None, :] <= at[:, None]
    return F.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1) @ v


def relative_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return F.softmax(scores + bias, dim=-1) @ v


def attention_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~seen, float("-inf"))
    column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    weights = F.softmax(torch.cat([scores, column], dim=-1), dim=-1)
    return weights[..., :-1] @ v


def grouped_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, ::2].repeat_interleave(2, dim=1) for x in (k, v))
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return F.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1) @ v


def dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    weights = F.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
    return F.dropout(weights, 0.1) @ v


def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) - math.log(k.shape[-2])
    seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~seen, float("-inf")).sigmoid() @ v


def retention(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    at = torch.arange(q.shape[-2], device=q.device)
    distance = at[:, None] - at[None, :]
    decay = torch.exp(-slopes[:, None, None] * distance)
    return torch.where(distance >= 0, q @ k.transpose(-2, -1) * decay, 0.0) @ v


# Title and what it is, in the page's order.
FORMS: dict[Callable[..., Tensor], tuple[str, str]] = {
    plain: ("Plain", "Encoders, cross attention, vision."),
    causal: ("Causal", "Decoders (GPT-2, Llama): half of the tiles are skipped."),
    sliding_window: ("Sliding window", "Mistral, Gemma 2 and 3, gpt-oss."),
    prefix_lm: ("Prefix", "PaliGemma, prefix language models."),
    chunked: ("Chunked", "Llama 4's local layers."),
    dilated: ("Dilated", "Any arithmetic of positions; it has no name, and needs none."),
    documents: ("Packed documents", "Which tiles are skipped is found when it runs."),
    padding: ("Padding", "BERT's extended mask: its finfo.min is a mask, not a number."),
    softcap: ("Softcap", "Gemma 2, Grok."),
    alibi: ("ALiBi", "Bloom, MPT."),
    relative_bias: ("Relative bias", "T5, Swin, any learned bias of any broadcast shape."),
    attention_sinks: ("Attention sinks", "gpt-oss: a learned logit a head that has no value."),
    dropout: ("Dropout", "Training: the mask is drawn in the kernel, and again in its backward."),
    grouped_queries: ("Grouped queries", "Llama 3, Mistral: K and V are read unexpanded."),
    sigmoid: ("Sigmoid", "Weights that nothing normalises (Ramapuram et al., 2024)."),
    retention: ("Retention", "No function at all: a decay and a mask (Sun et al., 2023)."),
}

BATCH, HEADS, LENGTH, DIM = 1, 2, 2048, 16
CAPTURED = {
    "document": lambda: torch.zeros(BATCH, LENGTH, dtype=torch.long),
    "kept": lambda: torch.ones(BATCH, LENGTH, dtype=torch.long),
    "slopes": lambda: torch.tensor([0.5, 0.25]),
    "bias": lambda: torch.randn(1, HEADS, LENGTH, LENGTH),
    "sinks": lambda: torch.randn(HEADS),
}
