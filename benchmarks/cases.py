"""The attention cases of `benchmarks/run.py`: as eager code, and as FlexAttention says it.

A `Variant` is the attention as a user writes it in PyTorch; a `Case` gives it a shape. Every case
has B * Sq * H * D of one training step, B*S = 16384 tokens of H*D = 2048, except the variants
(B2 H16 S8192 D128) and decoding (one query row against a long cache, 8 query heads a KV head).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TOKENS, WIDTH = 16384, 2048
SOFTCAP, WINDOW, PREFIX, DOCUMENTS = 50.0, 1024, 1024, 8

Scores = Callable[..., Tensor]
Flex = Callable[..., tuple[Callable | None, Callable | None]]


@dataclass(frozen=True)
class Variant:
    """One attention, spelled twice.

    score    (scores [B,H,Sq,Skv], q [Sq,1], kv [1,Skv], *captured) -> scores, or None
    seen     (q [Sq,1], kv [1,Skv], *captured) -> bool, broadcast to the scores, or None
    flex     (*captured) -> (score_mod, mask_mod) of FlexAttention
    capture  (case, device) -> captured tensors, each [B or 1, H or 1, ...]
    share    the share of the Sq x Skv pairs that the mask leaves, of (Sq, Skv)
    learned  the captured tensors are parameters: the backward gives their gradients too
    """

    name: str
    score: Scores | None = None
    seen: Scores | None = None
    flex: Flex = lambda *captured: (None, None)
    capture: Callable[[Case, torch.device], tuple[Tensor, ...]] = lambda case, device: ()
    share: Callable[[int, int], float] = lambda q_len, kv_len: 1.0
    learned: bool = False


@dataclass(frozen=True)
class Case:
    """A variant at a shape; bf16 unless run otherwise."""

    group: str
    variant: Variant
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    dim: int

    @property
    def name(self) -> str:
        length = f"{self.kv_len // 1024}k" if self.kv_len % 1024 == 0 else str(self.kv_len)
        return f"{self.variant.name}-B{self.batch}-S{length}-D{self.dim}"

    @property
    def flops(self) -> float:
        """Of the forward: two products over the pairs that the mask leaves."""
        pairs = self.variant.share(self.q_len, self.kv_len) * self.q_len * self.kv_len
        return 4.0 * self.batch * self.heads * pairs * self.dim

    def bytes(self, itemsize: int) -> int:
        """Least traffic of the forward: Q, K, V read once, O written once."""
        rows = 2 * self.heads * self.q_len + 2 * self.kv_heads * self.kv_len
        return self.batch * rows * self.dim * itemsize

    def inputs(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """q [B,H,Sq,D], k and v [B,Hkv,Skv,D], in memory [B,S,H,D] as projections leave them."""
        generator = torch.Generator(device).manual_seed(0)
        shapes = ((self.heads, self.q_len), *[(self.kv_heads, self.kv_len)] * 2)
        made = [
            torch.randn(self.batch, n, h, self.dim, device=device, generator=generator)
            .to(dtype)
            .transpose(1, 2)
            for h, n in shapes
        ]
        return [*made, *self.variant.capture(self, device)]

    def eager(self) -> Callable[..., Tensor]:
        """attention(q, k, v, *captured) as people write it."""
        variant, group, scale = self.variant, self.heads // self.kv_heads, self.dim**-0.5

        def attention(q: Tensor, k: Tensor, v: Tensor, *captured: Tensor) -> Tensor:
            if group > 1:
                k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
            scores = q @ k.transpose(-2, -1) * scale
            rows = torch.arange(q.shape[2], device=q.device)[:, None]
            columns = torch.arange(k.shape[2], device=q.device)[None, :]
            if variant.score is not None:
                scores = variant.score(scores, rows, columns, *captured)
            if variant.seen is not None:
                hidden = ~variant.seen(rows, columns, *captured)
                scores = scores.masked_fill(hidden, float("-inf"))
            return torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v

        return attention

    def one_head(self, x: Tensor, kv_head: int) -> Tensor:
        """What an input, output or gradient has for one KV head, and the query heads that share
        it; when decoding, of the last sequence alone."""
        heads = x.shape[1] // self.kv_heads
        if heads:
            x = x[:, kv_head * heads : (kv_head + 1) * heads]
        return x[-1:] if self.group == "decode" else x


def _slopes(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    exponents = torch.arange(1.0, case.heads + 1, device=device) * (-8 / case.heads)
    return (torch.exp2(exponents).view(1, case.heads, 1, 1),)


def _bias(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(1)
    shape = (1, case.heads, case.q_len, case.kv_len)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return (torch.randn(shape, device=device, generator=generator, dtype=dtype),)


def _table(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """A number for each head and distance q - kv."""
    generator = torch.Generator(device).manual_seed(1)
    distances = case.q_len + case.kv_len - 1
    table = torch.randn(1, case.heads, 1, distances, device=device, generator=generator)
    return (table.to(torch.bfloat16 if device.type == "cuda" else torch.float32),)


def _documents(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    at = torch.arange(case.kv_len, device=device) * DOCUMENTS // case.kv_len
    ids = at.expand(case.batch, -1).contiguous()
    return ids.view(case.batch, 1, -1, 1), ids.view(case.batch, 1, 1, -1)


def _causal(q: Tensor, kv: Tensor, *captured: Tensor) -> Tensor:
    return kv <= q


def _flex_causal(b, h, q, kv):
    return kv <= q


def _half(q_len: int, kv_len: int) -> float:
    return 0.5 + 0.5 / q_len


def _window_share(q_len: int, kv_len: int) -> float:
    window = min(WINDOW, q_len)
    return (window * (window + 1) / 2 + (q_len - window) * window) / (q_len * kv_len)


def _prefix_share(q_len: int, kv_len: int) -> float:
    prefix = min(PREFIX, q_len)
    return _half(q_len, kv_len) + prefix * (prefix - 1) / 2 / (q_len * kv_len)


FULL = Variant("full")
CAUSAL = Variant("causal", seen=_causal, flex=lambda: (None, _flex_causal), share=_half)
VARIANTS = (
    Variant(
        "softcap",
        score=lambda s, q, kv: SOFTCAP * torch.tanh(s / SOFTCAP),
        seen=_causal,
        flex=lambda: (lambda s, b, h, q, kv: SOFTCAP * torch.tanh(s / SOFTCAP), _flex_causal),
        share=_half,
    ),
    Variant(
        "alibi",
        score=lambda s, q, kv, slopes: s + slopes * (kv - q),
        seen=_causal,
        flex=lambda slopes: (
            lambda s, b, h, q, kv: s + slopes[0, h, 0, 0] * (kv - q),
            _flex_causal,
        ),
        capture=_slopes,
        share=_half,
    ),
    Variant(
        "window1024",
        seen=lambda q, kv: (kv <= q) & (q - kv < WINDOW),
        flex=lambda: (None, lambda b, h, q, kv: (kv <= q) & (q - kv < WINDOW)),
        share=_window_share,
    ),
    Variant(
        "documents8",
        seen=lambda q, kv, of_q, of_kv: of_q == of_kv,
        flex=lambda of_q, of_kv: (
            None,
            lambda b, h, q, kv: of_q[b, 0, q, 0] == of_kv[b, 0, 0, kv],
        ),
        capture=_documents,
        share=lambda q_len, kv_len: 1 / DOCUMENTS,
    ),
    Variant(
        "bias",
        score=lambda s, q, kv, bias: s + bias,
        flex=lambda bias: (lambda s, b, h, q, kv: s + bias[0, h, q, kv], None),
        capture=_bias,
        learned=True,
    ),
    Variant(
        "relative",
        score=lambda s, q, kv, table: s + table[:, :, 0, q - kv + s.shape[-1] - 1],
        flex=lambda table: (
            lambda s, b, h, q, kv: s + table[0, h, 0, q - kv + table.shape[3] // 2],
            None,
        ),
        capture=_table,
        learned=True,
    ),
    Variant(
        "prefix1024",
        seen=lambda q, kv: (kv <= q) | (kv < PREFIX),
        flex=lambda: (None, lambda b, h, q, kv: (kv <= q) | (kv < PREFIX)),
        share=_prefix_share,
    ),
)


def square(group: str, variant: Variant, length: int, dim: int, tokens: int = TOKENS) -> Case:
    heads = max(WIDTH // dim, 1)
    return Case(group, variant, max(tokens // length, 1), heads, heads, length, length, dim)


def all_cases() -> list[Case]:
    """Every case, by group: "dense", "variants", "lengths" (for the plot by length), "decode"."""
    cases = [
        square("dense", variant, length, dim)
        for dim in (64, 128, 256)
        for length in (2048, 16384)
        for variant in (FULL, CAUSAL)
    ]
    cases += [square("variants", variant, 8192, 128) for variant in (CAUSAL, *VARIANTS)]
    cases += [square("lengths", CAUSAL, 2**n, 128) for n in range(9, 15)]
    cases += [
        Case("decode", FULL, batch, 64, 8, 1, length, 128)
        for batch in (1, 4, 32)
        for length in (8192, 32768, 65536)
    ]
    return cases


def tiny(case: Case) -> Case:
    """The same attention in a size for a CPU: for a test of the runner itself."""
    group = case.heads // case.kv_heads
    q_len = 1 if case.q_len == 1 else 64
    return Case(case.group, case.variant, 1, 2 * group, 2, q_len, 64, 16)
