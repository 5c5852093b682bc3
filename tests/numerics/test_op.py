"""`fa3::attention` against dense float64 attention whose scores numpy computes from the text."""

import numpy as np
import pytest
import torch

from fa3_compile.lower.choose import choose
from fa3_compile.lower.dispatch import make_problem
from fa3_compile.runtime.op import join_text, split_text
from fa3_compile.spec.attention import AttentionSpec
from tests.numerics.cases import CASES, Case, dense

attention = torch.ops.fa3.attention


KERNELS = [(name, kernel) for name, case in CASES.items() for kernel in ("reference", "cpu")]
KERNELS = [(name, kernel) for name, kernel in KERNELS if kernel != "cpu" or CASES[name].cpu]
every_kernel = pytest.mark.parametrize("name, kernel", KERNELS)


@every_kernel
def test_forward(name, kernel):
    case = CASES[name]
    q, k, v, aux = case.tensors()
    text = case.text(kernel)
    assert choose(make_problem(text, q, k, v, aux), (kernel,)).kernel.name == kernel
    out, lse = attention(q, k, v, aux, list(case.sizes), text)
    expected, expected_lse = dense(case)
    np.testing.assert_allclose(out.numpy(), expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(lse.numpy(), expected_lse, rtol=2e-5, atol=2e-5)
    assert lse.is_contiguous() and lse.dtype == torch.float32


@pytest.mark.parametrize("name", [x for x, case in CASES.items() if not case.cpu])
def test_cpu_says_why_not(name):
    case = CASES[name]
    choice = choose(make_problem(case.text(), *case.tensors()))
    assert choice.kernel is None
    assert len(choice.reasons["cpu"].split()) > 4
    assert "asked for" in choice.reasons["reference"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["reference", "cpu"])
def test_half_precision(kernel, dtype):
    case = CASES["alibi"]
    q, k, v, aux = case.tensors(dtype)
    out, lse = attention(q, k, v, aux, [], case.text(kernel))
    expected, expected_lse = dense(case)
    assert out.dtype == dtype and lse.dtype == torch.float32
    np.testing.assert_allclose(out.float().numpy(), expected, atol=0.04)
    np.testing.assert_allclose(lse.numpy(), expected_lse, atol=0.02)


SMALL = {"shape": (1, 2, 1, 3, 4), "dims": (3, 2)}
CHECKED = [x for x, case in CASES.items() if case.grads and case.shape == Case("").shape]


@pytest.mark.parametrize("name", CHECKED)
def test_gradcheck(name):
    case = CASES[name]
    case = Case(case.fields, case.aux, case.kinds, sizes=case.sizes, **SMALL)
    q, k, v, aux = case.tensors(torch.float64, requires_grad=True)
    text = case.text()

    def outputs(q, k, v, *floats):
        floats = iter(floats)
        tensors = [next(floats) if x.requires_grad else x for x in aux]
        out, lse = attention(q, k, v, tensors, list(case.sizes), text)
        return out, torch.where(lse > -1e30, lse, 0)

    inputs = (q, k, v, *(x for x in aux if x.requires_grad))
    assert torch.autograd.gradcheck(outputs, inputs, nondet_tol=0)


@pytest.mark.parametrize("name", [n for n, kernel in KERNELS if kernel == "cpu"])
@pytest.mark.parametrize("of_lse", [0.0, 3.0])
def test_cpu_gradients_are_the_references(name, of_lse):
    case = CASES[name]
    found = []
    for kernel in ("cpu", "reference"):
        q, k, v, aux = case.tensors()
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out, lse = attention(q, k, v, aux, list(case.sizes), case.text(kernel))
        weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
        total = (out * weight).sum()
        if of_lse:  # of rows that see a key
            total = total + (of_lse * weight[..., 0] * lse).masked_fill(lse < -1e8, 0.0).sum()
        found.append(torch.autograd.grad(total, inputs))
    for got, want, x in zip(*found, inputs):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)
        assert got.stride() == torch.empty_like(x).stride()


def test_gradient_of_lse_alone_and_of_unused_inputs():
    case = CASES["bias"]
    q, k, v, [bias] = case.tensors(requires_grad=True)
    _, lse = attention(q, k, v, [bias], [], case.text())
    dq, dv = torch.autograd.grad(lse.sum(), [q, v])
    assert dq.abs().max() > 0 and dv.abs().max() == 0
    out, _ = attention(q, k.detach(), v, [bias.detach()], [], case.text())
    assert torch.autograd.grad(out.sum(), [q], retain_graph=True)[0].shape == q.shape


def test_second_derivative_is_refused():
    case = CASES["plain"]
    q, k, v, _ = case.tensors(requires_grad=True)
    out, _ = attention(q, k, v, [], [], case.text())
    [dq] = torch.autograd.grad(out.sum(), [q], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        dq.sum().backward()


@pytest.mark.parametrize("shape", [(0, 4, 2, 5, 5), (2, 4, 2, 0, 5), (2, 4, 2, 5, 0)])
@pytest.mark.parametrize("kernel", ["reference", "cpu,reference"])
def test_empty(shape, kernel):
    case = Case("score=0.3*s, mask=kv <= q, dead=nan", shape=shape)
    q, k, v, _ = case.tensors(requires_grad=True)
    out, lse = attention(q, k, v, [], [], case.text(kernel))
    out.sum().backward()
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert (out == 0).all() and q.grad.shape == q.shape and k.grad.shape == k.shape


@pytest.mark.parametrize("kv_len", [1, 7, 15, 16, 37])
@pytest.mark.parametrize("kernel", ["reference", "cpu"])
def test_a_row_of_nan_stays_one(kernel, kv_len):
    case = Case("score=0.3*s", shape=(1, 2, 1, 3, kv_len))
    q, k, v, _ = case.tensors()
    q[0, 0, 1, 2] = float("nan")
    out, lse = attention(q, k, v, [], [], case.text(kernel))
    assert out.isnan().all(-1).nonzero().tolist() == [[0, 0, 1]] == lse.isnan().nonzero().tolist()


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
def test_any_strides(kernel):
    case = CASES["bias"]
    q, k, v, [bias] = case.tensors()
    want, _ = attention(q, k, v, [bias], [], case.text(kernel))
    packed = torch.stack([k, v], -1)  # k and v as every second element
    q2 = q.flip(-1).contiguous().flip(-1).mT.contiguous().mT
    wide = torch.zeros(1, 4, 19, 40)[..., :23].copy_(bias)
    got, _ = attention(q2, packed[..., 0], packed[..., 1], [wide], [], case.text(kernel))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_out_order_is_the_memory_order():
    q, k, v, _ = CASES["plain"].tensors()
    for order in ("bhqd", "bqhd", "qbhd"):
        text = f"attention(score=0.3*s, out_order={order}) #;kernels=reference"
        out, _ = attention(q, k, v, [], [], text)
        assert out.permute(["bhqd".index(x) for x in order]).is_contiguous()


@pytest.mark.parametrize(
    "name", ["bias", "sinks", "order", "v-narrower", "window-of-size", "sigmoid"]
)
@pytest.mark.parametrize("kernel", ["reference", "cpu,reference"])
def test_opcheck(name, kernel):
    case = CASES[name]
    q, k, v, aux = case.tensors(requires_grad=True)
    arguments = (q, k, v, aux, list(case.sizes), case.text(kernel))
    torch.library.opcheck(attention.default, arguments)
    out, lse = attention(*arguments)
    tensors = [x.detach() for x in (out, q, k, v, out, lse)]
    needs = [True, False, True, *(x.requires_grad for x in aux)]
    aux = [x.detach() for x in aux]
    torch.library.opcheck(
        torch.ops.fa3.attention_backward.default,
        (tensors[0], None, *tensors[1:], aux, list(case.sizes), case.text(kernel), needs),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_errors_say_what_is_wrong():
    q, k, v, _ = CASES["plain"].tensors()
    text = "attention(score=s)"
    with pytest.raises(ValueError, match="4, 4 and 3 dimensions"):
        attention(q, k, v[0], [], [], text)
    with pytest.raises(ValueError, match="one float dtype"):
        attention(q, k, v.half(), [], [], text)
    with pytest.raises(RuntimeError, match="a multiple of Hkv"):
        attention(q[:, :3], k, v, [], [], text)
    with pytest.raises(ValueError, match="1 captured tensors and 0 sizes"):
        attention(q, k, v, [], [], "attention(score=s + load(0, h), aux=[float])")
    with pytest.raises(ValueError, match="not an attention spec"):
        attention(q, k, v, [], [], "softmax(s)")


def test_spec_text_with_options():
    spec = AttentionSpec()
    text = join_text(spec, "c0ffee", {"kernels": "cpu,reference", "autotune": "quick"})
    assert text == "attention(score=s) #c0ffee;autotune=quick;kernels=cpu,reference"
    assert split_text(text) == (spec, {"kernels": "cpu,reference", "autotune": "quick"})
    assert split_text(str(spec)) == (spec, {})
    assert join_text(spec) == str(spec)
    with pytest.raises(ValueError, match="key=value"):
        split_text("attention(score=s) #c0ffee;fast")
