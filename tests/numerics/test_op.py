"""`fa3::attention` against dense float64 attention whose scores numpy computes from the text."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fa3_compile.lower.choose import choose
from fa3_compile.lower.dispatch import make_problem
from fa3_compile.lower.inductor import install
from fa3_compile.runtime.op import join_text, split_text
from fa3_compile.spec.attention import AttentionSpec
from tests.spec.by_hand import evaluate

attention = torch.ops.fa3.attention
LOWEST = "-3.4028234663852886e+38"


@dataclass
class Case:
    """One attention; `aux` are the shapes of captured tensors, by the letters of their axes."""

    fields: str
    aux: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    shape: tuple[int, ...] = (2, 4, 2, 19, 23)  # B, H, Hkv, Sq, Skv
    dims: tuple[int, int] = (8, 8)
    sizes: tuple[int, ...] = ()
    cpu: bool = True
    grads: bool = True

    def text(self, kernels="reference"):
        aux = f", aux=[{', '.join(self.kinds)}]" if self.kinds else ""
        return f"attention({self.fields}{aux}) #;kernels={kernels}"

    def tensors(self, dtype=torch.float32, requires_grad=False):
        """(q, k, v, aux), the same in every call; q, k, v as views of [B, S, H, D]."""
        generator = torch.Generator().manual_seed(0)
        b, h, hkv, sq, skv = self.shape
        d, dv = self.dims

        def normal(batch, heads, length, dim):
            x = torch.randn(batch, length, heads, dim, generator=generator, dtype=torch.float64)
            return x.to(dtype).transpose(1, 2).requires_grad_(requires_grad)

        q, k, v = normal(b, h, sq, d), normal(b, hkv, skv, d), normal(b, hkv, skv, dv)
        length = {"b": b, "h": h, "q": sq, "k": skv, "1": 1, "7": 7, "t": 64}
        aux = []
        for axes, kind in zip(self.aux, self.kinds):
            x = torch.rand([length[a] for a in axes], generator=generator, dtype=torch.float64)
            if kind == "float":
                aux.append(x.to(dtype).requires_grad_(requires_grad))
            else:
                aux.append(x > 0.4 if kind == "bool" else (x * 3).long())
        return q, k, v, aux


CASES = {
    "plain": Case("score=0.3*s"),
    "no-scale": Case("score=s"),
    "causal": Case("score=0.3*s, mask=kv <= q, dead=nan"),
    "causal-bottom-right": Case(
        "score=0.3*s, mask=kv <= q + Skv - Sq, dead=nan", shape=(1, 2, 1, 7, 23)
    ),
    "window": Case("score=0.3*s, mask=(kv <= q) & (q - kv < 5), dead=nan"),
    "window-of-size": Case("score=0.3*s, mask=(kv <= q) & (q - kv < n1), dead=nan", sizes=(1, 6)),
    "softcap": Case("score=5*tanh(0.2*s), mask=kv <= q, dead=nan", cpu=False),
    "alibi": Case(
        "score=0.3*s + load(0, h)*(kv - q), mask=kv <= q, dead=nan", aux=("h",), kinds=("float",)
    ),
    "alibi-closed": Case("score=0.3*s + pow(2, -0.5*h - 0.5)*(kv - q)"),
    "bias": Case("score=0.3*s + load(0, 0, h, q, kv)", aux=("1hqk",), kinds=("float",)),
    "bias-of-half-precision-order": Case(
        "score=0.3*s + load(0, q, kv, h)", aux=("qkh",), kinds=("float",)
    ),
    "relative-bias": Case(
        "score=s + load(0, mod(kv - q, 11) + 5, h)", aux=("th",), kinds=("float",)
    ),
    "guarded-load": Case(
        "score=s + where(kv < 7, load(0, b, kv), load(1, b, kv))",
        aux=("b7", "b1"),
        kinds=("float", "float"),
    ),
    "padding": Case(
        "score=0.3*s, mask=load(0, b, kv) != 0, dead=nan", aux=("bk",), kinds=("bool",)
    ),
    "documents": Case(
        "score=0.3*s, mask=(load(0, b, q) == load(1, b, kv)) & (kv <= q + 9), dead=zero",
        aux=("bq", "bk"),
        kinds=("int", "int"),
    ),
    "gqa-8": Case("score=0.3*s, mask=kv <= q, dead=nan", shape=(1, 8, 1, 5, 9)),
    "sinks": Case(
        "score=0.3*s, mask=q - kv > 3, dead=nan, sinks=[load(0, h), 0.5]",
        aux=("h",),
        kinds=("float",),
        cpu=False,
    ),
    "dead-nan": Case("score=0.3*s, mask=kv > q + 9, dead=nan", grads=False),
    "dead-zero": Case("score=0.3*s, mask=kv > q + 9, dead=zero"),
    "dead-uniform": Case(f"score=0.3*s, mask=kv > q + 9, dead=score, fill={LOWEST}"),
    "dead-absorbed": Case(
        "score=0.3*s, mask=kv > q + 9, dead=score, fill=0.3*s - 3e+38", grads=False
    ),
    "dead-additive": Case("score=0.3*s, mask=kv > q + 9, dead=score, fill=0.3*s - 100"),
    "dead-of-scores": Case("score=0.3*s, mask=kv > q + 9, dead=score, fill=tanh(s)", cpu=False),
    "v-narrower": Case("score=0.3*s, mask=kv <= q, dead=nan", dims=(12, 5)),
    "v-wider": Case("score=0.3*s", dims=(4, 20)),
    "order": Case("score=0.3*s, out_order=bqhd"),
    "one-query": Case("score=0.3*s, mask=kv <= q + Skv - Sq, dead=nan", shape=(3, 4, 4, 1, 17)),
    "by-head-and-row": Case("score=0.1*h*s + 0.2*q - 0.1*b*kv", cpu=False),
    "steps-of-scores": Case("score=0.3*s + where(s > 0.5, 1, 0)", cpu=False),
    "steps-by-key": Case("score=0.3*s + where(kv > 5, 1, 0)"),
    "constant": Case("score=2.0, mask=kv <= q, dead=nan", cpu=False, grads=False),
    "nothing": Case("score=s, mask=False, dead=zero"),
    "sigmoid": Case(
        "normalize=none, score=sigmoid(0.3*s - load(0, h)), mask=kv <= q + 3",
        aux=("h",),
        kinds=("float",),
        cpu=False,
    ),
    "squares-and-sums": Case(
        "normalize=sums, score=pow(0.3*s, 2)*load(0, b, kv), mask=q - kv > 3, out_order=bqhd",
        aux=("bk",),
        kinds=("float",),
        cpu=False,
    ),
}


def dense(case):
    """(out, lse) in float64, by numpy, from the definition in AttentionSpec's docstring."""
    spec, _ = split_text(case.text())
    q, k, v, aux = case.tensors()
    q, k, v = (x.numpy().astype(np.float64) for x in (q, k, v))
    b, h, hkv, sq, skv = case.shape
    k, v = (np.repeat(x, h // hkv, axis=1) for x in (k, v))
    at = dict(zip("bhq", np.ix_(range(b), range(h), range(sq))))
    at = {name: x[..., None] for name, x in at.items()}
    at |= {"kv": np.arange(skv), "s": q @ k.swapaxes(-1, -2), "Sq": sq, "Skv": skv}
    at |= {f"n{i}": n for i, n in enumerate(case.sizes)}

    class Clamped:
        def __init__(self, x):
            self.x = x.numpy()

        def __getitem__(self, index):
            return self.x[tuple(np.clip(i, 0, n - 1) for i, n in zip(index, self.x.shape))]

    loads = [Clamped(x) for x in aux]
    shape = (b, h, sq, skv)
    score = np.broadcast_to(evaluate(spec.score, loads, **at), shape)
    mask = np.broadcast_to(evaluate(spec.mask, loads, **at), shape)
    if not spec.normalized:
        p = np.where(mask, score, 0.0)
        return p @ v, p.sum(-1) * spec.sums
    dead = ~mask.any(-1, keepdims=True)
    x = np.where(mask, score, -np.inf)
    if spec.fill is not None:
        fill = evaluate(spec.fill, loads, **at).astype(np.float32)  # absorbs s, as in float32
        x = np.where(dead, fill, x)
    sinks = [np.broadcast_to(evaluate(e, loads, **at), (b, h, sq, 1)) for e in spec.sinks]
    logits = np.concatenate([x, *sinks], -1)
    with np.errstate(all="ignore"):
        top = logits.max(-1, keepdims=True)
        weight = np.exp(logits - np.where(np.isinf(top), 0, top))
        total = weight.sum(-1, keepdims=True)
        p = (weight / total)[..., :skv]
        lse = (np.log(total) + top)[..., 0]
    if spec.dead == "zero":
        p = np.where(total == 0, 0, p)
    return p @ v, lse


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


@pytest.fixture
def no_failed_lowering(caplog):
    install()
    yield
    assert not [r for r in caplog.records if "could not be lowered" in r.getMessage()]


COMPILED = [
    ("bias", "reference", True),
    ("bias", "cpu", False),
    ("sinks", "reference", False),
    ("documents", "cpu", True),
    ("dead-uniform", "cpu", False),
    ("v-narrower", "cpu", False),
    ("guarded-load", "reference", False),
    ("relative-bias", "reference", False),
]


@pytest.mark.parametrize("name, kernel, dynamic", COMPILED)
def test_compiled(name, kernel, dynamic, no_failed_lowering):
    case = CASES[name]
    text = case.text(kernel)

    def model(q, k, v, aux, sizes):
        out, _ = attention(2 * q, k, v, aux, sizes, text)
        return out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1).sin()

    results = []
    for function in (model, torch.compile(model, dynamic=dynamic, fullgraph=True)):
        q, k, v, aux = case.tensors(requires_grad=True)
        if kernel == "cpu":
            aux = [x.detach() for x in aux]
        inputs = [x for x in (q, k, v, *aux) if x.requires_grad]
        out = function(q, k, v, aux, list(case.sizes))
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_compiled_for_other_lengths(no_failed_lowering):
    case = CASES["causal"]
    function = torch.compile(
        lambda q, k, v: attention(q, k, v, [], [q.shape[2]], case.text("cpu"))[0], dynamic=True
    )
    for length in (19, 33, 64):
        q, k, v, _ = Case(case.fields, shape=(2, 4, 2, length, length + 3)).tensors()
        want, _ = attention(q, k, v, [], [length], case.text("reference"))
        torch.testing.assert_close(function(q, k, v), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_and_checkpoint(compiled, no_failed_lowering):
    case = CASES["causal"]

    def model(q, k, v):
        return attention(q, k, v, [], [], case.text())[0]

    function = torch.compile(model) if compiled else model
    q, k, v, _ = case.tensors(requires_grad=True)
    want = torch.autograd.grad(model(q, k, v).sum(), [q, k, v])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = checkpoint(function, q, k, v, use_reentrant=False)
        assert out.dtype == torch.float32
        got = torch.autograd.grad(out.sum(), [q, k, v])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_lowering_that_fails_leaves_the_call(monkeypatch, caplog):
    """A backward lowering that raised would raise at `.backward()`."""
    from fa3_compile.lower import inductor

    def fail(*_):
        raise RuntimeError("no program")

    install()
    monkeypatch.setattr(inductor, "_inline", fail)
    case = CASES["causal"]
    q, k, v, _ = case.tensors(requires_grad=True)
    function = torch.compile(lambda q, k, v: attention(q, k, v, [], [], case.text())[0])
    out = function(q, k, v)
    out.sum().backward()
    np.testing.assert_allclose(out.detach().numpy(), dense(case)[0], rtol=2e-5, atol=2e-5)
    assert len([r for r in caplog.records if "could not be lowered" in r.getMessage()]) == 2


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
