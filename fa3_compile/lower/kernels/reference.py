"""`reference`: the attention as torch operators; any device, any spec, every tensor in memory.

What every other kernel is tested against, and the last resort where none can be built. Scores,
softmax and accumulation are float32 (float64 for float64 inputs); the probabilities are rounded
to v's dtype before they meet v, as eager code does.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import sympy
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fa3_compile.lower.choose import REFERENCE, Gradients, Kernel, Problem, register
from fa3_compile.lower.nested_autograd import gradients
from fa3_compile.lower.printers.elements import Shape, elements
from fa3_compile.runtime.op import BackwardInputs
from fa3_compile.spec import expr as E
from fa3_compile.spec.attention import AttentionSpec


def attention(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    aux: Sequence[Tensor],
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """(out [B,H,Sq,Dv] in q's dtype, lse [B,H,Sq]) of q [B,H,Sq,D], k [B,Hkv,Skv,D] and
    v [B,Hkv,Skv,Dv]; rows without a key are as AttentionSpec.dead says, their lse is -inf.
    Without a softmax the lse is 0, or the sum of the row's weights."""
    with _no_autocast(q.device):
        return _attention(spec, q, k, v, aux, sizes)


def _attention(spec, q, k, v, aux, sizes):
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1:3]
    if statically_known_true(kv_len == 0):
        return q.new_zeros(batch, heads, q_len, v.shape[3]), _infinite_lse(q, dtype)

    # The queries that share a KV head stand below each other, so that k is not expanded.
    group = heads // kv_heads
    rows = (batch, kv_heads, group * q_len)
    shape = Shape(batch, heads, q_len, kv_len)
    s = torch.matmul(q.reshape(*rows, q.shape[3]).to(dtype), k.to(dtype).transpose(-1, -2))
    s = s.reshape(shape.lengths)

    if _absorbs(spec.score):
        s = s.double()
    if not spec.normalized:
        score, mask = _elements(spec, shape, s, aux, sizes)
        p = torch.where(mask, score.to(dtype), 0.0).expand(shape.lengths)
        out = torch.matmul(p.to(v.dtype).reshape(*rows, kv_len), v)
        sums = p.sum(-1) if spec.sums else p.new_zeros(shape.lengths[:3])
        return out.reshape(batch, heads, q_len, v.shape[3]), sums
    x, sinks, factor = _scores(spec, shape, s, aux, sizes, dtype)
    top = x.amax(-1, keepdim=True)
    for sink in sinks:
        top = torch.maximum(top, sink)
    top = torch.where(top == float("-inf"), 0.0, top).detach()
    total = torch.exp(x - top).sum(-1, keepdim=True)
    for sink in sinks:
        total = total + torch.exp(sink - top)
    empty = total == 0
    positive = torch.where(empty, 1.0, total)
    p = _softmax(x, sinks, empty if spec.dead == "zero" else None)
    if factor is not None:
        p = p * factor
    lse = torch.where(empty, float("-inf"), top + torch.log(positive)).squeeze(-1)
    out = torch.matmul(p.to(v.dtype).reshape(*rows, kv_len), v)
    return out.reshape(batch, heads, q_len, v.shape[3]), lse


def _softmax(x: Tensor, sinks: Sequence[Tensor], zero: Tensor | None) -> Tensor:
    """Eager's own operator; 0 in the rows of `zero`. A row's gradients are made to sum to 0 but for
    the rounding of each: the operator's are all off by that of the same sum, and eager's are not
    where a softmax by hand has a maximum with a gradient, which shows in sums of them and beside a
    weight of nearly 1."""
    keys = x.shape[-1]
    if zero is not None:
        x = torch.where(zero, 0.0, x)
    x = torch.cat((x, *(sink.expand(*x.shape[:3], 1) for sink in sinks)), -1) if sinks else x
    x = x.view_as(x)  # its gradient is that of the softmax alone
    p = torch.softmax(x, -1)
    if x.requires_grad:
        weights = p.detach()
        x.register_hook(lambda grad: grad - weights * grad.sum(-1, keepdim=True))
    p = p[..., :keys]
    return p if zero is None else torch.where(zero, 0.0, p)


def _absorbs(score: sympy.Expr) -> bool:
    """Whether a function is taken of a fill near float32's limits: a gradient times that fill
    overflows before the function's slope of 0 can make it 0."""
    functions = score.atoms(sympy.exp, sympy.tanh, E.sigmoid, E.erf)
    return any(abs(n) > 1e30 and n.is_finite for x in functions for n in x.atoms(sympy.Number))


def _infinite_lse(q: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.full(q.shape[:3], float("-inf"), dtype=dtype, device=q.device)


def _scores(spec, shape, s, aux, sizes, dtype):
    """(what the softmax is taken of, the sinks, each [B|1, H|1, Sq|1, 1], the weight or None)."""
    score, mask, *rest = _elements(spec, shape, s, aux, sizes)
    fill = rest.pop(0) if spec.fill is not None else None
    factor = rest.pop().to(dtype) if spec.weight is not None else None
    score = score.to(dtype).expand(shape.lengths)
    rest = [x.to(dtype) for x in rest]
    if spec.mask == sympy.true:
        return score, rest, factor
    masked: Tensor | float = float("-inf")
    if fill is not None:
        masked = torch.where(mask.any(-1, keepdim=True), float("-inf"), fill.to(dtype))
    return torch.where(mask, score, masked), rest, factor


def _elements(spec, shape, s, aux, sizes) -> list[Tensor]:
    given = spec, shape, s, aux, sizes, s.dtype, s.device
    if not torch.is_grad_enabled() or spec.mask == sympy.true or not _bends(spec.score):
        return elements(spec.expressions, *given)
    mask, *rest = elements(spec.expressions[1:], *given)
    return [*elements([spec.score], *given, kept=mask), mask, *rest]


def _bends(score: sympy.Expr) -> bool:
    """Whether what is read is in anything but a sum, whose slope is 1."""
    terms = (x.as_coeff_Mul()[1] for x in sympy.Add.make_args(score))
    return any(E.loads_in(x) and not isinstance(x, E.load) for x in terms)


def attention_backward(
    spec: AttentionSpec,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    aux: Sequence[Tensor],
    sizes: Sequence[int],
    needs: Sequence[bool],
) -> Gradients:
    """(dq, dk, dv, daux), None where `needs` (q, k, v, then each aux) says so."""
    inputs = [q, k, v, *aux]
    with torch.enable_grad(), _no_autocast(q.device):
        leaves = [x.detach().requires_grad_(n) if n else x.detach() for x, n in zip(inputs, needs)]
        out, lse = _attention(spec, leaves[0], leaves[1], leaves[2], leaves[3:], sizes)
        wanted = [x for x, n in zip(leaves, needs) if n]
        outputs, tangents = [out], [dout]
        if dlse is not None and lse.requires_grad:
            outputs, tangents = [out, lse], [dout, dlse.to(lse.dtype)]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if out.requires_grad or lse.requires_grad:
            found = gradients(outputs, wanted, tangents)
    filled = (torch.zeros_like(x) if g is None else g.detach() for x, g in zip(wanted, found))
    grads = [next(filled) if n else None for n in needs]
    return grads[0], grads[1], grads[2], grads[3:]


def _no_autocast(device: torch.device):
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class Reference(Kernel):
    """Eager PyTorch's mathematics in O(S^2) memory, for every spec and device."""

    name = REFERENCE
    priority = -100
    inline = True

    def supports(self, problem: Problem) -> str | None:
        return None

    def run(self, problem, q, k, v, aux, sizes):
        return attention(problem.spec, q, k, v, aux, sizes)

    def supports_backward(self, problem: Problem) -> str | None:
        return None

    def run_backward(self, problem: Problem, given: BackwardInputs) -> Gradients:
        dout, dlse, q, k, v, _, _, aux, sizes, needs = given
        return attention_backward(problem.spec, dout, dlse, q, k, v, aux, sizes, needs)


register(Reference())
