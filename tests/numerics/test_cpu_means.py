"""`cpu`: gradients where K or V are far from zero, by the rule of `assert_matches_eager`."""

import pytest
import torch

from fa3_compile.runtime import cpu_backward
from fa3_compile.testing import Result, assert_close_to_oracle

attention = torch.ops.fa3.attention
F32, BF16 = torch.float32, torch.bfloat16
Q_LEN, KV_LEN, DIM = 48, 400, 8


def unit(x):
    """Between 0 and 1, as torch.rand has it."""
    return torch.special.ndtr(x)


# name -> (dtype, KV heads, score and mask, K, V) of normal numbers
CASES = {
    "V": (F32, 4, "score=0.35*s", lambda k: k, lambda v: v + 5),
    "V in bfloat16": (BF16, 4, "score=0.35*s", lambda k: k, lambda v: v + 20),
    "all between 0 and 1": (F32, 4, "score=0.35*s", unit, unit),
    "all between 0 and 1 in bfloat16": (BF16, 4, "score=0.35*s", unit, unit),
    "V, in groups": (F32, 2, "score=0.35*s, mask=q - kv < 3, dead=zero", lambda k: k, lambda v: v + 5),
    "V of one head": (F32, 4, "score=0.35*s", lambda k: k, lambda v: v + 20 * torch.eye(4)[1][:, None, None]),
    "K": (F32, 4, "score=0.35*s", lambda k: k + 5, lambda v: v),
    "K, causal": (F32, 2, "score=0.35*s, mask=(kv <= q)", lambda k: k + 5, lambda v: v + 1),
}  # fmt: skip


def operands(name):
    _, kv_heads, fields, changed_k, changed_v = CASES[name]
    generator = torch.Generator().manual_seed(0)
    kv_len = Q_LEN if "kv <= q" in fields else KV_LEN

    def normal(heads, length):
        return torch.randn(1, heads, length, DIM, generator=generator)

    q, dout = normal(4, Q_LEN), normal(4, Q_LEN)
    if changed_k is unit:
        q = unit(q)
    return q, changed_k(normal(kv_heads, kv_len)), changed_v(normal(kv_heads, kv_len)), dout


def gradients(name, tensors, kernel, dtype) -> Result:
    *inputs, dout = (x.to(dtype) for x in tensors)
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    fields = CASES[name][2]
    if kernel:
        out, _ = attention(q, k, v, [], [], f"attention({fields}) #;kernels={kernel}")
    else:
        out = eager(q, k, v, fields)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    return Result({}, dict(zip("qkv", grads)))


def eager(q, k, v, fields):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = q @ k.mT * 0.35
    rows, keys = torch.arange(s.shape[-2])[:, None], torch.arange(s.shape[-1])
    if "kv <= q" in fields:
        s = s.masked_fill(keys > rows, float("-inf"))
    if "q - kv" in fields:
        s = s.masked_fill(rows - keys >= 3, float("-inf"))
    return s.softmax(-1) @ v


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_eagers(name):
    tensors, dtype = operands(name), CASES[name][0]
    rounded = [x.to(dtype) for x in tensors]
    oracle = gradients(name, rounded, "", torch.float64)
    found = gradients(name, rounded, "cpu", dtype)
    assert_close_to_oracle(found, gradients(name, rounded, "", dtype), oracle)


def test_what_a_mask_hides_moves_nothing():
    """Keys and values of 1e6 that no row sees, as a buffer may hold them."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, 2, 40, DIM, generator=generator) for _ in range(4))
    v = v + 5
    found = []
    for hidden in (0.0, 1e6):
        k[:, :, 6:], v[:, :, 6:] = hidden, hidden
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        spec = "attention(score=0.35*s, mask=kv < 6) #;kernels=cpu"
        out, _ = attention(*leaves, [], [], spec)
        grads = torch.autograd.grad(out, leaves, dout)
        found.append([grads[0], grads[1][:, :, :6], grads[2][:, :, :6]])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_numbers_about_zero_are_computed_once(monkeypatch):
    monkeypatch.setattr(cpu_backward, "_forward", None)
    tensors = [torch.randn(1, 4, 64, DIM) for _ in range(4)]
    gradients("V", tensors, "cpu", F32)
    with pytest.raises(TypeError):
        gradients("V", [*tensors[:2], tensors[2] + 5, tensors[3]], "cpu", F32)
