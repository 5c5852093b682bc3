"""What the cases of Triton's interpreter have in common, forward and backward: parts of specs, captured
tensors by the names that say what they hold, and how far results are from float64's."""

from __future__ import annotations

import torch

from fa3_compile.spec.attention import AttentionSpec

# The kinds of captured tensors that are not of floats.
KINDS = {
    "documents": "int",
    "seed": "int",
    "lengths": "int",
    "index": "int",
    "dense_by_head": "bool",
    "padding": "bool",
    "nothing": "bool",
    "dense": "bool",
}
LOWEST = torch.finfo(torch.float32).min
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Parts of specs.
CAUSAL = "(kv - q <= 0)"
MIN = "-3.4028234663852886e38"
# Two masks of 0 and 1 that are added, as the lowest number times what they hide.
ADDED = f"where(load(0, b, kv) + load(1, b, kv) - 2 == 0, 0, {MIN[1:]}*(load(0, b, kv) + load(1, b, kv) - 2))"
WINDOW = f"{CAUSAL} & (q - kv <= 9)"
SLOPES = "load(0, 0, h, 0, 0)"
DROP = "where(uniform(load(0, 0), b, h, q, kv) < 0.25, 0, 1.3333333333333333)"


def parsed(fields: str, captures: tuple[str, ...]) -> AttentionSpec:
    """The spec of these fields, which reads tensors of these names."""
    if captures:
        fields += f", aux=[{', '.join(KINDS.get(x, 'float') for x in captures)}]"
    return AttentionSpec.parse(f"attention({fields})")


def distance(x: torch.Tensor, exact: torch.Tensor) -> float:
    return (x.double() - exact).nan_to_num(0.0).abs().max().item()


def captured(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """For (B, H, Hkv, Sq, Skv, ...)."""
    batch, heads, _, q_len, kv_len, *_ = shape
    match name:
        case "slopes":
            return torch.rand(1, heads, 1, 1)
        case "heads":
            return torch.rand(heads)
        case "scalar":
            return torch.tensor(0.3)
        case "bias":
            return torch.randn(batch, heads, kv_len, q_len).transpose(2, 3)
        case "head_bias":
            return torch.randn(1, heads, q_len, kv_len)
        case "batch_bias":
            return torch.randn(batch, 1, q_len, kv_len)
        case "plain_bias":  # longer than the axes
            return torch.randn(q_len + 3, kv_len)
        case "masked_bias" | "lost_bias":
            x = torch.randn(batch, heads, q_len, kv_len)
            x[:, :, :, :20] = LOWEST
            if name == "lost_bias":
                x[:, :, 5] = float("-inf")
            x[:, :, 7] = LOWEST
            return x
        case "rows":
            return torch.randn(batch, q_len)
        case "seen":
            return (torch.arange(kv_len) < torch.tensor([[kv_len - 9], [0]])).float()
        case "seen too":
            return (torch.arange(kv_len) >= torch.tensor([[7], [kv_len // 2]])).float()
        case "temperatures":
            return torch.tensor([0.0, -95.0, -200.0, 0.5])
        case "keys":
            return torch.randn(batch, kv_len)
        case "relative":
            return torch.randn(heads, 15)
        case "distances":
            return torch.randn(heads, q_len + kv_len - 1)
        case "distances of all":
            return torch.randn(q_len + kv_len - 1)
        case "turned_relative":
            return torch.randn(15, heads)
        case "index":
            return torch.randint(15, (q_len, kv_len))
        case "decomposed":
            return torch.randn(batch, heads, q_len, max(8, kv_len // 8 + 1))
        case "positions":
            return torch.randn(max(q_len, kv_len))
        case "padding":
            return (torch.arange(kv_len) < torch.tensor([[kv_len], [7]])).view(2, 1, 1, kv_len)
        case "nothing":
            return torch.zeros(batch, 1, 1, kv_len, dtype=torch.bool)
        case "documents":
            return (torch.arange(max(q_len, kv_len)) // 13).expand(batch, -1)
        case "dense_by_head":
            return torch.rand(heads, q_len, kv_len) > torch.arange(heads).view(-1, 1, 1) * 0.98
        case "lengths":
            return torch.tensor([[kv_len, 3], [17, 50]])
        case "seed":
            return torch.tensor([-(2**40) - 12345])
        case "dense":
            return torch.rand(1, 1, q_len, kv_len) > 0.6
    raise ValueError(name)
