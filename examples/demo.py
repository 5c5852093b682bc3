"""Compile four attention models with backend="fa3"; print what was found, the error, the times.

Three are Hugging Face models with random weights and `attn_implementation="eager"`, attention
written out in PyTorch; the fourth is written by hand below. Runs on a GPU where there is one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, BertConfig, Gemma2Config, LlamaConfig

from fa3_compile.report import Report, collect

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
BATCH = 2
LENGTH = 4096 if DEVICE == "cuda" else 512
SIZES: dict[str, Any] = {
    "hidden_size": 2048 if DEVICE == "cuda" else 256,
    "intermediate_size": 4096 if DEVICE == "cuda" else 512,
    "num_attention_heads": 16 if DEVICE == "cuda" else 8,
    "num_hidden_layers": 2,
    "vocab_size": 1024,
    "max_position_embeddings": LENGTH,
}


class AlibiWindowAttention(nn.Module):
    """Self-attention over a sliding window, with ALiBi's linear penalty on distance."""

    slopes: torch.Tensor

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        # One slope a head: 1/2, 1/4, ... for 8 heads (ALiBi, Press et al. 2022, section 3).
        self.register_buffer("slopes", 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        position = torch.arange(length, device=x.device)
        distance = position[:, None] - position[None, :]
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        scores = scores - self.slopes[:, None, None] * distance
        seen = (distance >= 0) & (distance < self.window)
        weights = scores.masked_fill(~seen, float("-inf")).float().softmax(dim=-1).to(v.dtype)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, dim))


def llama() -> tuple[nn.Module, dict[str, Any]]:
    return _hugging_face(LlamaConfig(**SIZES, num_key_value_heads=4)), {"input_ids": _tokens()}


def gemma2() -> tuple[nn.Module, dict[str, Any]]:
    heads = SIZES["num_attention_heads"]
    config = Gemma2Config(
        **SIZES,
        num_key_value_heads=heads // 2,
        head_dim=SIZES["hidden_size"] // heads,
        sliding_window=LENGTH // 4,
    )
    return _hugging_face(config), {"input_ids": _tokens()}


def bert() -> tuple[nn.Module, dict[str, Any]]:
    lengths = torch.tensor([[LENGTH], [LENGTH * 2 // 3]], device=DEVICE)
    padding = (torch.arange(LENGTH, device=DEVICE) < lengths).long()
    return _hugging_face(BertConfig(**SIZES)), {"input_ids": _tokens(), "attention_mask": padding}


def alibi_window() -> tuple[nn.Module, dict[str, Any]]:
    dim = SIZES["hidden_size"]
    model = AlibiWindowAttention(dim, heads=SIZES["num_attention_heads"], window=LENGTH // 8)
    return _placed(model), {"x": torch.randn(BATCH, LENGTH, dim, device=DEVICE, dtype=DTYPE)}


def _hugging_face(config: Any) -> nn.Module:
    config.use_cache = False
    return _placed(AutoModel.from_config(config, attn_implementation="eager"))


def _placed(model: nn.Module) -> nn.Module:
    return model.to(device=DEVICE, dtype=DTYPE).eval()


def _tokens() -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], (BATCH, LENGTH), device=DEVICE)


def _output(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result.last_hidden_state


def _milliseconds(call: Callable[[], Any], seconds: float = 1.0) -> float:
    """The median time of a call, over as many calls as fit into `seconds`, at least three."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[len(times) // 2]


@torch.no_grad()
def compare(
    name: str, model: nn.Module, inputs: dict[str, Any]
) -> tuple[Report, float, dict[str, float]]:
    """The report, the largest difference from eager, and the milliseconds of each way to run."""
    torch._dynamo.reset()
    inductor = torch.compile(model, backend="inductor")
    inductor(**inputs)
    times = {
        "eager": _milliseconds(lambda: model(**inputs)),
        "inductor": _milliseconds(lambda: inductor(**inputs)),
    }
    # Dynamo keeps compiled code by function, so each backend starts afresh.
    torch._dynamo.reset()
    fa3 = torch.compile(model, backend="fa3")
    with collect() as report:
        start = time.perf_counter()
        actual = _output(fa3(**inputs))
        report.compile_seconds = time.perf_counter() - start
    times["fa3"] = _milliseconds(lambda: fa3(**inputs))
    error = (actual.float() - _output(model(**inputs)).float()).abs().max().item()
    return report, error, times


def main() -> None:
    torch.manual_seed(0)
    print(f"{DEVICE}, {DTYPE}, batch {BATCH}, length {LENGTH}")
    rows = []
    for make in (llama, gemma2, bert, alibi_window):
        report, error, times = compare(make.__name__, *make())
        print(f"\n=== {make.__name__} ===\n{report}")
        rows.append((make.__name__, error, times))

    print(f"\n{'model':<14}{'largest error':>14}{'eager ms':>10}{'inductor ms':>13}{'fa3 ms':>9}")
    for name, error, times in rows:
        print(
            f"{name:<14}{error:>14.1e}{times['eager']:>10.1f}{times['inductor']:>13.1f}"
            f"{times['fa3']:>9.1f}"
        )


if __name__ == "__main__":
    main()
