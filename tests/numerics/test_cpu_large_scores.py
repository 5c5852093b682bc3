"""`cpu`: gradients where scores are so large that an LSE in float32 has no digits of the weights."""

import pytest
import torch

from fa3_compile.runtime import cpu_backward

attention = torch.ops.fa3.attention

LOWEST = torch.finfo(torch.float32).min


def hidden(*fills):
    """A bias [6, 7] whose row 2 has fills alone: the first for 3 keys, the second for 4."""
    bias = torch.zeros(6, 7)
    bias[2] = torch.tensor(fills).repeat_interleave(torch.tensor([3, 4]))
    return bias


LARGE = {
    "scaled": ("score=3e3*s", []),
    "one-hot": ("score=1e6*s", []),
    "beyond float32's integers": ("score=1e9*s", []),
    "causal": ("score=1e4*s, mask=kv <= q, dead=nan", []),
    "masked": ("score=1e4*s, mask=q - kv < 3, dead=zero", []),
    "of a row": ("score=s + load(0, q)", [-1e6 * torch.arange(6.0)]),
    "of a key": ("score=s + load(0, kv)", [-1e9 - 1e8 * torch.arange(7.0)]),
    "of rows without keys": ("score=s, mask=kv < q - 2, dead=score, fill=s - 1000.0", []),
    "of rows of a large fill": ("score=s, mask=kv < q - 2, dead=score, fill=s - 1e6", []),
    "two masks that were added": ("score=s + load(0, q, kv)", [hidden(-float("inf"), LOWEST)]),
    "a mask added twice": ("score=s + load(0, q, kv)", [hidden(LOWEST, LOWEST / 2)]),
    "a mask that is added": ("score=s + load(0, q, kv)", [hidden(LOWEST, LOWEST)]),
    "two masks in one": ("score=s + load(0, kv) + load(1, q)", [-1e9 * torch.eye(7)[0], -1e9 * torch.eye(6)[2]]),
}  # fmt: skip


def gradients(text, aux, kernel, of_lse: float | None = 0.0):
    """Of q, k and v; None where nothing reads the LSE."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).requires_grad_()

    q, k, v = normal(2, 4, 6, 8), normal(2, 2, 7, 8), normal(2, 2, 7, 5)
    out, lse = attention(q, k, v, aux, [], f"attention({text}) #;kernels={kernel}")
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
    total = (out * weight).sum()
    if of_lse is not None:
        total = total + of_lse * (lse * weight[..., 0]).clamp(min=-1e12).sum()
    return torch.autograd.grad(total, (q, k, v))


@pytest.mark.parametrize("of_lse", [0.0, 2.0])
@pytest.mark.parametrize("name", LARGE)
def test_gradients_are_eagers(name, of_lse):
    fields, aux = LARGE[name]
    fields += f", aux=[{', '.join(['float'] * len(aux))}]" if aux else ""
    found = gradients(fields, aux, "cpu", of_lse)
    wanted = gradients(fields, aux, "reference", of_lse)
    for got, want in zip(found, wanted):
        # Where all weight is on one key, the reference has the digits of what is left, and here,
        # as in eager, it is what rounding leaves of a difference.
        atol = 1e-9 + 1e-5 * float(want.abs().max())
        torch.testing.assert_close(got, want, rtol=1e-5, atol=atol)


def test_rows_of_one_fill_take_atens_kernel(monkeypatch):
    monkeypatch.setattr(cpu_backward, "_by_kv_head", None)
    fields = "score=s + load(0, q, kv), aux=[float]"
    found = gradients(fields, [hidden(LOWEST, LOWEST)], "cpu", None)
    wanted = gradients(fields, [hidden(LOWEST, LOWEST)], "reference", None)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_autocast_does_not_reach_them():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients("score=30.0*s", [], "cpu")
    for got, want in zip(found, gradients("score=30.0*s", [], "reference")):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_ordinary_scores_take_atens_kernel(monkeypatch):
    monkeypatch.setattr(cpu_backward, "_by_kv_head", None)
    gradients("score=0.5*s", [], "cpu")
    with pytest.raises(TypeError):
        gradients("score=3e3*s", [], "cpu")


def test_compiled():
    """The kernel is chosen when it runs, by the scores."""

    def model(q, k, v):
        return torch.softmax(q @ k.mT, -1) @ v

    compiled = torch.compile(model, backend="fa3", options={"strict": True})
    for scale in (1.0, 1e5):
        found = []
        for function in (model, compiled):
            torch.manual_seed(0)
            inputs = [torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3)]
            out = function(inputs[0] * scale, *inputs[1:])
            found.append(torch.autograd.grad(out[..., 0].square().sum(), inputs))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
