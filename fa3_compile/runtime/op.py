"""The operators `fa3::attention` and `fa3::attention_backward`.

What is here holds for every implementation: schemas, shape checks, output layouts (the fake
implementations) and the autograd formula. The arithmetic is `fa3_compile.lower.dispatch`'s.

The operator's `spec` argument is the text of an AttentionSpec, which may be followed by
` #<hash>;<option>=<value>;...`: part of every compiler cache's key, and no part of the spec.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fa3_compile.spec.attention import AttentionSpec

LIBRARY = torch.library.Library("fa3", "DEF")
LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor[] aux, SymInt[] sizes, str spec)"
    " -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
LIBRARY.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out,"
    " Tensor lse, Tensor[] aux, SymInt[] sizes, str spec, bool[] needs)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor[] daux)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def join_text(spec: AttentionSpec, source_hash: str = "", options: Mapping[str, str] = {}) -> str:
    """The operator's `spec` argument: the spec, a hash of our sources, and options."""
    suffix = ";".join([source_hash, *(f"{k}={v}" for k, v in sorted(options.items()))])
    return f"{spec} #{suffix}" if suffix else str(spec)


@functools.lru_cache(maxsize=4096)
def split_text(text: str) -> tuple[AttentionSpec, Mapping[str, str]]:
    """(spec, options) of the operator's `spec` argument; ValueError for a malformed one."""
    body, _, suffix = text.partition(" #")
    options = {}
    for item in suffix.split(";")[1:]:
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"an option of an attention is key=value, got {item!r}")
        options[key] = value
    return AttentionSpec.parse(body), options


class BackwardInputs(NamedTuple):
    """What `fa3::attention_backward` is given, the text of the spec left out.

    dout   [B,H,Sq,Dv] in q's dtype: the gradient of the output
    dlse   [B,H,Sq], of the LSE; None where nothing has used it
    q      [B,H,Sq,D]; k [B,Hkv,Skv,D] and v [B,Hkv,Skv,Dv]
    out    [B,H,Sq,Dv] and lse [B,H,Sq], of the forward
    aux    the captured tensors
    needs  of q, k, v, then each of aux, whether its gradient is wanted
    """

    dout: Tensor
    dlse: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    aux: Sequence[Tensor]
    sizes: Sequence[int]
    needs: Sequence[bool]


class Implementation(Protocol):
    """What computes the operators; see `fa3_compile.lower.dispatch`."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        aux: Sequence[Tensor],
        sizes: Sequence[int],
        text: str,
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, given: BackwardInputs, text: str
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]: ...


@functools.cache
def _implementation() -> Implementation:
    # By name: `lower` imports `runtime`, and a compiled artifact may call the operator in a
    # process that has imported neither.
    return importlib.import_module("fa3_compile.lower.dispatch")  # pyright: ignore


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    aux: Sequence[Tensor],
    sizes: Sequence[int],
    spec: AttentionSpec,
) -> None:
    """ValueError or RuntimeError where the arguments do not make an attention."""
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(
            "fa3::attention takes q [B,H,Sq,D], k [B,Hkv,Skv,D] and v [B,Hkv,Skv,Dv], "
            f"got {q.dim()}, {k.dim()} and {v.dim()} dimensions"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(
            "fa3::attention takes q, k, v of one float dtype, "
            f"got {q.dtype}, {k.dtype}, {v.dtype}; cast them alike"
        )
    if len(aux) != len(spec.aux) or len(sizes) < spec.size_count:
        raise ValueError(
            f"the spec takes {len(spec.aux)} captured tensors and {spec.size_count} sizes, "
            f"got {len(aux)} and {len(sizes)}: {spec}"
        )
    torch._check(k.shape[0] == q.shape[0] and v.shape[0] == q.shape[0], lambda: _shapes(q, k, v))
    torch._check(k.shape[1] == v.shape[1] and k.shape[2] == v.shape[2], lambda: _shapes(q, k, v))
    torch._check(q.shape[3] == k.shape[3], lambda: _shapes(q, k, v))
    torch._check(q.shape[1] % k.shape[1] == 0, lambda: _shapes(q, k, v))


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return (
        "fa3::attention takes q [B,H,Sq,D], k [B,Hkv,Skv,D] and v [B,Hkv,Skv,Dv], H a multiple of "
        f"Hkv, got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
    )


def empty_out(q: Tensor, v: Tensor, order: str) -> Tensor:
    """An uninitialised [B,H,Sq,Dv] in q's dtype, its memory in the spec's `out_order`."""
    length = dict(zip("bhqd", (*q.shape[:3], v.shape[3])))
    out = q.new_empty([length[x] for x in order])
    return out.permute([order.index(x) for x in "bhqd"])


def out_strides(shape: Sequence[int], order: str) -> tuple[int, ...]:
    """The strides of `empty_out` for an output of this shape."""
    steps, step = {}, 1
    for axis in reversed(order):
        steps[axis] = step
        step *= max(shape["bhqd".index(axis)], 1)
    return tuple(steps[x] for x in "bhqd")


def outputs_as_declared(
    q: Tensor, v: Tensor, out: Tensor, lse: Tensor, order: str
) -> tuple[Tensor, Tensor]:
    """(out, lse) as the operator gives them, from those of an implementation."""
    if out.stride() != out_strides(out.shape, order) or out.dtype != q.dtype:
        out = empty_out(q, v, order).copy_(out)
    return out, lse.contiguous()


def lse_dtype(q: Tensor) -> torch.dtype:
    """float32; float64 for float64 inputs, so that gradients can be checked numerically."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@torch.library.impl(LIBRARY, "attention", "CompositeExplicitAutograd")
def _attention(q, k, v, aux, sizes, spec):
    parsed, _ = split_text(spec)
    check_inputs(q, k, v, aux, sizes, parsed)
    out, lse = _implementation().forward(q, k, v, aux, sizes, spec)
    return outputs_as_declared(q, v, out, lse, parsed.out_order)


@torch.library.register_fake("fa3::attention", lib=LIBRARY)
def _attention_fake(q, k, v, aux, sizes, spec):
    parsed, _ = split_text(spec)
    check_inputs(q, k, v, aux, sizes, parsed)
    lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q))
    return empty_out(q, v, parsed.out_order), lse


def gradients_as_declared(inputs: Sequence[Tensor], grads: Sequence) -> tuple:
    """(dq, dk, dv, daux) as the operator gives them, from those of an implementation.

    A gradient that nobody needs is an empty tensor; the others have the layout that
    `torch.empty_like` gives their input.
    """
    dq, dk, dv, daux = grads
    found = [_like(x, g) for x, g in zip(inputs, (dq, dk, dv, *daux))]
    return found[0], found[1], found[2], found[3:]


def _like(x: Tensor, grad: Tensor | None) -> Tensor:
    if grad is None:
        return x.new_empty(0)
    if grad.dtype == x.dtype and grad.stride() == x.stride() and is_dense(x.shape, x.stride()):
        return grad
    like = torch.empty_like(x)
    return grad if grad.dtype == like.dtype and grad.stride() == like.stride() else like.copy_(grad)


@functools.lru_cache(maxsize=4096)
def is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements fill the memory between the first and the last, each once; then
    `torch.empty_like` keeps the strides. Kept, as every backward asks: 2 us for four axes."""
    expected = 1
    for stride, length in sorted(zip(strides, shape)):
        if length != 1:
            if stride != expected:
                return False
            expected *= length
    return True


def _autograd_allowed():
    """The reference differentiates with torch.autograd, which is off inside an operator that has
    an autograd formula."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradMeta", "AutogradOther", "ADInplaceOrView"):
        exclude = exclude.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude)


@torch.library.impl(LIBRARY, "attention_backward", "CompositeExplicitAutograd")
def _attention_backward(dout, dlse, q, k, v, out, lse, aux, sizes, spec, needs):
    given = BackwardInputs(dout, dlse, q, k, v, out, lse, aux, sizes, needs)
    with _autograd_allowed():
        grads = _implementation().backward(given, spec)
    return gradients_as_declared((q, k, v, *aux), grads)


@torch.library.register_fake("fa3::attention_backward", lib=LIBRARY)
def _attention_backward_fake(dout, dlse, q, k, v, out, lse, aux, sizes, spec, needs):
    inputs = (q, k, v, *aux)
    grads = [torch.empty_like(x) if n else x.new_empty(0) for x, n in zip(inputs, needs)]
    return grads[0], grads[1], grads[2], grads[3:]


def _setup_context(ctx, inputs, output):
    q, k, v, aux, sizes, spec = inputs
    ctx.save_for_backward(q, k, v, *output, *aux)
    ctx.sizes, ctx.spec = sizes, spec
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    q, k, v, out, lse, *aux = ctx.saved_tensors
    of_q, of_k, of_v, of_aux, *_ = ctx.needs_input_grad
    needs = [of_q, of_k, of_v, *of_aux]
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv, daux = torch.ops.fa3.attention_backward(
        dout, dlse, q, k, v, out, lse, aux, ctx.sizes, ctx.spec, needs
    )
    grads = [g if n else None for g, n in zip((dq, dk, dv, *daux), needs)]
    # torch.library sees a list of integers as one leaf, an empty list as a list.
    return grads[0], grads[1], grads[2], grads[3:], None if ctx.sizes else [], None


torch.library.register_autograd(
    "fa3::attention", _backward, setup_context=_setup_context, lib=LIBRARY
)


def _double_backward(ctx, *grads):
    raise NotImplementedError(
        "fa3::attention has no second derivative; compile this function with "
        'backend="inductor", or leave create_graph off'
    )


torch.library.register_autograd("fa3::attention_backward", _double_backward, lib=LIBRARY)
