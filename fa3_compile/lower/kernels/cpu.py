"""`cpu`: ATen's own flash kernel, for scores that are a constant times `s` plus a bias.

The bias, whatever computes it, is one tensor [B|1, H|1, Sq|1, Skv|1]; a mask is -inf in it, a
causal one the kernel's own flag. Against Inductor's code for the same eager attention, with
ALiBi or with a window and padding (8 heads, 2048 x 2048, head dim 64, float32 and bfloat16, 2
cores): 1.4 to 2.8 times as fast in inference, 1.2 to 1.8 in training.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from fa3_compile.lower.choose import Gradients, Kernel, Problem, register
from fa3_compile.lower.printers.elements import Shape, elements
from fa3_compile.runtime.cpu_backward import cpu_backward
from fa3_compile.runtime.cpu_forward import FLASH, cpu_forward
from fa3_compile.runtime.op import BackwardInputs
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.expr import KV, Boolean, Expr, Q, S, depends_on, load, loads_in, where
from fa3_compile.spec.fills import OUT_OF_REACH
from fa3_compile.spec.mask_biases import bias_of

CAUSAL = sympy.Le(KV, Q)

# With fewer keys and no mask the kernel gives zeros for a row of NaN (torch 2.13).
WHOLE_VECTOR = 16
# A fill from here on is a mask: a float32 score of it has no digit of `s`, and its LSE no log(Skv).
MASKED = -1e8
# No score that is not masked is below this.
LEAST = -1e30


def _may_hide(term: Expr) -> bool:
    """Whether a term of the bias may be as low as a mask's fill where no condition of the spec's
    mask says so: what is read, by position or as it is, and a large number that is chosen. ALiBi's
    slopes, read by head and multiplied by a distance, may not."""
    if (bias := bias_of(term)) is not None:
        return -MASKED < bias[0] < -OUT_OF_REACH
    if isinstance(term.as_coeff_Mul()[1], load):
        return True
    by_position = any(depends_on(x, [Q, KV]) for x in loads_in(term))
    chosen = {y for x in term.atoms(where) for y in x.args[1:] if y.is_number}
    return by_position or any(float(y) <= MASKED for y in chosen)  # pyright: ignore


def _weighs_some(spec: AttentionSpec, bias: Expr) -> bool:
    """Whether a row whose scores are all those of masked keys may still weigh some keys and not
    others, of which neither the LSE nor the bias holds how many: by a bias that hides keys beside
    a mask, by a sum of masks of which some keys have more than others. Without a mask the bias
    says it all: where keys are not hidden alike, `cpu_backward` computes the softmax anew."""
    if not spec.has_mask:
        return False
    if any(map(_may_hide, sympy.Add.make_args(bias))):
        return True
    found = (bias_of(x) for x in spec.score.atoms(where))
    masks = [loads_in(x) for c, x in filter(None, found) if c > -MASKED]
    return len(masks) > 1 or any(len(x) > 1 for x in masks)


@dataclass(frozen=True)
class _Plan:
    """How the spec is said to ATen: softmax of scale * s + where(mask, bias, masked scores).

    causal  the kernel's own causal flag is set; `mask` is what else there is
    """

    scale: float
    bias: Expr
    causal: bool
    mask: Boolean
    fill_scale: float
    fill_bias: Expr | None

    @property
    def bias_may_mask(self) -> bool:
        """Whether the bias can be an additive mask: a load by q or kv, or of a whole head, or one
        that a condition chooses, as a fill that is known only when it runs."""
        hides = any(map(_may_hide, sympy.Add.make_args(self.bias)))
        chosen = any(x.has(load) for x in self.bias.atoms(where))
        return hides or chosen or self.bias.has(sympy.oo, -sympy.oo)

    @property
    def all_masked(self) -> float:
        """The LSE below which all scores of a row are those of masked keys, and of one weight."""
        fill = 0.0 if self.fill_bias is None else float(self.fill_bias)
        return max(LEAST, fill / 2) if fill <= MASKED else LEAST

    @property
    def masked_scale(self) -> float:
        """The derivative by s of the scores of a row that is all masked."""
        if self.fill_bias is not None:
            return self.fill_scale
        return self.scale if self.bias_may_mask else 0.0


class Unsupported(Exception):
    """The reason why a spec cannot be said to ATen's kernel."""


@functools.lru_cache(maxsize=1024)
def _plan(spec: AttentionSpec) -> _Plan | Unsupported:
    try:
        if not spec.normalized:
            raise Unsupported("the weights of ATen's flash kernel are always a softmax")
        if spec.sinks:
            raise Unsupported("ATen's flash kernel has no attention sinks")
        if spec.weight is not None:
            raise Unsupported("ATen's flash kernel has no factor after the softmax, no dropout")
        scale, bias = _linear(spec.score, "score")
        if not scale > 0:
            raise Unsupported(f"ATen's flash kernel takes a positive scale, this one is {scale}")
        fill_scale, fill_bias = 0.0, None
        if spec.fill is not None:
            fill_scale, fill_bias = _linear(spec.fill, "fill")
            if not fill_bias.is_number:
                raise Unsupported(f"masked scores are not a constant: {spec.fill}")
            absorbs = float(fill_bias) <= MASKED
            if not absorbs and fill_scale != scale:
                raise Unsupported(f"rows of masked scores {spec.fill} are no bias to the others")
        causal, mask = _split_causal(spec)
        return _Plan(scale, bias, causal, mask, fill_scale, fill_bias)
    except Unsupported as error:
        return error


def _split_causal(spec: AttentionSpec) -> tuple[bool, Boolean]:
    """(whether the causal flag says part of the mask, the rest of the mask).

    The flag leaves no fill, and no row without a key; with a fill, it must be the whole mask.
    """
    parts = sympy.And.make_args(spec.mask)
    if CAUSAL not in parts or (spec.fill is not None and len(parts) > 1):
        return False, spec.mask
    return True, sympy.And(*(x for x in parts if x != CAUSAL))


def _linear(expr: Expr, what: str) -> tuple[float, Expr]:
    """(a, b) with expr == a * s + b, b without s."""
    if not depends_on(expr, [S]):
        return 0.0, expr
    slope = expr.diff(S)
    bias = expr.subs(S, 0)
    # A select by the score itself, s + where(s > 0, 1, 0), has the slope of a line and is none.
    selects = any(S in x.args[0].free_symbols for x in expr.atoms(where))
    if selects or not slope.is_number or slope.has(sympy.Derivative, sympy.Subs):
        raise Unsupported(f"the {what} is not a constant times s plus a bias: {expr}")
    return float(slope), bias


def _bias(problem: Problem, q: Tensor, k: Tensor, aux, sizes) -> tuple[Tensor | None, ...]:
    """(bias [B|1, H|1, Sq|1, Skv|1] in float32, rows [B|1, H|1, Sq|1] that have no key); None
    for a bias of zeros, and where every row has a key."""
    spec, plan = problem.spec, _made(problem)
    if plan.bias == 0 and plan.mask == sympy.true:
        return None, None
    shape = Shape(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    exprs = (plan.bias, plan.mask, spec.mask)
    bias, mask, whole_mask = elements(exprs, spec, shape, None, aux, sizes, torch.float32, q.device)
    bias = bias.to(torch.float32)
    if plan.mask != sympy.true:
        masked = torch.full((), float("-inf"), dtype=torch.float32, device=q.device)
        if plan.fill_bias is not None:
            fill = max(float(plan.fill_bias), torch.finfo(torch.float32).min)
            some = mask.expand(*mask.shape[:3], shape.kv_len).any(-1, keepdim=True)
            masked = torch.where(some, masked, fill)
        bias = torch.where(mask, bias, masked)
    bias = bias if bias.dim() == 4 else bias.reshape(1, 1, 1, 1)
    if plan.bias_may_mask:
        return bias, (torch.where(whole_mask, bias, float("-inf")) == float("-inf")).all(-1)
    if plan.mask == sympy.true or plan.fill_bias is not None:
        return bias, None
    return bias, ~whole_mask.expand(*whole_mask.shape[:3], shape.kv_len).any(-1)


def _made(problem: Problem) -> _Plan:
    plan = _plan(problem.spec)
    assert isinstance(plan, _Plan), plan
    return plan


def _padded(x: Tensor, dim: int) -> Tensor:
    """With head dimension `dim`, and with the stride of 1 along it that the kernel relies on."""
    if x.shape[-1] != dim:
        return F.pad(x, (0, dim - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


class Cpu(Kernel):
    name = "cpu"
    priority = 10
    inline = True

    def supports(self, problem: Problem) -> str | None:
        if problem.device.type != "cpu":
            return f"cpu is for CPU tensors, these are on {problem.device}"
        if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"ATen's flash kernel takes float32, bfloat16 and float16, not {problem.dtype}"
        if 0 in (problem.batch, problem.heads, problem.q_len, problem.kv_len, problem.dim):
            return "ATen's flash kernel takes no empty tensors"
        if isinstance(reason := _plan(problem.spec), Unsupported):
            return str(reason)
        if problem.needs_grad:
            return self.supports_backward(problem)
        return None

    def run(self, problem, q, k, v, aux, sizes):
        plan = _made(problem)
        bias, empty = _bias(problem, q, k, aux, sizes)
        if bias is None and not guard_or_false(problem.kv_len >= WHOLE_VECTOR):
            bias = q.new_zeros(1, 1, 1, 1, dtype=torch.float32)
        dim = max(problem.dim, problem.v_dim)
        padded = (_padded(q, dim), _padded(k, dim), _padded(v, dim))
        if bias is not None and plan.mask != sympy.true and not plan.bias_may_mask:
            out, lse = cpu_forward(*padded, bias, plan.causal, plan.scale)
        else:
            out, lse = FLASH(*padded, is_causal=plan.causal, attn_mask=bias, scale=plan.scale)
        out = out[..., : v.shape[-1]]
        if empty is None:
            return out, lse.contiguous()
        # For a row of -inf the kernel gives zeros and an lse of 0.
        lse = torch.where(empty, float("-inf"), lse)
        if problem.spec.dead != "zero":
            out = torch.where(empty.unsqueeze(-1), float("nan"), out)
        return out, lse

    def supports_backward(self, problem: Problem) -> str | None:
        if any(problem.aux_needs_grad):
            return "ATen's flash kernel has no gradient for a bias"
        if _weighs_some(problem.spec, _made(problem).bias):
            return "a row of masked keys may have weights that its LSE does not hold"
        return None

    def run_backward(self, problem: Problem, given: BackwardInputs) -> Gradients:
        dout, dlse, q, k, v, out, lse, aux, sizes, needs = given
        spec, plan = problem.spec, _made(problem)
        bias, _ = _bias(problem, q, k, aux, sizes)
        corrections = None
        if bias is not None:
            masked = lse < plan.all_masked
            if plan.bias_may_mask:
                # Keys that are hidden less than others have all of a row's weight.
                alike = bias.amax(-1) == bias.amin(-1)
                masked = masked & (alike if dlse is None else lse == float("-inf"))
            corrections = _masked_rows_backward(spec, plan, masked, dout, q, k, v, lse)
            dout = torch.where(masked.unsqueeze(-1), 0.0, dout)
            out = torch.where(masked.unsqueeze(-1), 0.0, out)
            dlse = None if dlse is None else torch.where(masked, 0.0, dlse)
            lse = torch.where(masked, 0.0, lse)
        grads = cpu_backward(dout, dlse, q, k, v, out, lse, bias, plan.causal, plan.scale)
        if corrections is not None:
            grads = [(g + c).to(g.dtype) for g, c in zip(grads, corrections)]
        dq, dk, dv = (g if n else None for g, n in zip(grads, needs))
        return dq, dk, dv, [None] * len(aux)


def _masked_rows_backward(
    spec: AttentionSpec,
    plan: _Plan,
    masked: Tensor,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the rows in `masked` [B,H,Sq], of one bias for all keys, add to dq, dk, dv, in float32;
    one product of [D, Skv] and [Skv, Dv] a head.

    Their probabilities are 1/Skv: with p uniform, ds = a/Skv * (dout.v - dout.mean(v)) is linear
    in dout, and the sums over kv and q factor. A row of -inf has none ("zero") or NaN ("nan").
    """
    batch, kv_heads, kv_len, _ = k.shape
    rows = (batch, kv_heads, -1)
    empty_weight = 0.0 if spec.dead == "zero" else float("nan")
    weight = torch.where(lse == float("-inf"), empty_weight, torch.ones_like(lse)).unsqueeze(-1)
    dout = torch.where(masked.unsqueeze(-1), dout.float() * weight, 0.0)
    dout = dout.reshape(*rows, dout.shape[-1])
    q_rows, k, v = q.float().reshape(*rows, q.shape[-1]), k.float(), v.float()
    dv = (dout.sum(2, keepdim=True) / kv_len).expand(v.shape)
    a = plan.masked_scale
    if a == 0:
        return torch.zeros_like(q_rows).view(q.shape), torch.zeros_like(k), dv
    against_mean = (dout * v.mean(2, keepdim=True)).sum(-1, keepdim=True)
    dq = dout @ (v.mT @ k / kv_len) - against_mean * k.mean(2, keepdim=True)
    dk = (v @ (dout.mT @ q_rows) - (against_mean * q_rows).sum(2, keepdim=True)) / kv_len
    return (a * dq).view(q.shape), a * dk, dv


register(Cpu())
