"""`options={"verify": True}`: the reference beside every kernel, on the real inputs.

One line for every result in the log `fa3_compile.lower.verify`: INFO where the kernel is as near
to float64 as the rule of `fa3_compile.testing` asks, WARNING where it is not, which the report
notes too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fa3_compile import report
from fa3_compile.lower.choose import Gradients, Kernel, Problem, reference
from fa3_compile.runtime.op import BackwardInputs
from fa3_compile.spec.forms import name_of

log = logging.getLogger(__name__)

# Roundings of the largest element that are forgiven on top of twice the reference's own error.
FLOOR_ROUNDINGS = 8
# A gradient that is zero in exact arithmetic is the rounding of terms as large as the largest
# gradient: its floor is that of a gradient of this share of it.
GRADIENT_SHARE = 0.25


def verify(
    kernel: Kernel,
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    aux: Sequence[Tensor],
    sizes: Sequence[int],
    out: Tensor,
) -> bool:
    """Compares `out` [B,H,Sq,Dv] with the reference in float64; whether it is near enough."""
    wide_aux = [_wide(x) for x in aux]
    oracle, _ = reference().run(problem, _wide(q), _wide(k), _wide(v), wide_aux, sizes)
    plain, _ = reference().run(problem, q, k, v, aux, sizes)
    return _near(kernel, problem, "output", out, plain, oracle)


def verify_gradients(
    kernel: Kernel, problem: Problem, given: BackwardInputs, found: Gradients
) -> bool:
    """As `verify`, for the gradients that are asked for."""
    oracle = reference().run_backward(problem, pytree.tree_map_only(Tensor, _wide, given))
    plain = reference().run_backward(problem, given)
    captured = (f"gradient of captured tensor {i}" for i in range(len(given.aux)))
    names = ("dq", "dk", "dv", *captured)
    exact = _flat(oracle)
    whole = max((_largest(x) for x in exact if x is not None), default=0.0)
    near = True
    for name, ours, theirs, truth in zip(names, _flat(found), _flat(plain), exact):
        if ours is not None and theirs is not None and truth is not None:
            floor = GRADIENT_SHARE * whole
            near = _near(kernel, problem, name, ours, theirs, truth, floor) and near
    return near


def _near(
    kernel: Kernel,
    problem: Problem,
    what: str,
    ours: Tensor,
    plain: Tensor,
    oracle: Tensor,
    least_scale: float = 0.0,
) -> bool:
    finite = torch.isfinite(plain) & torch.isfinite(oracle)
    same = bool((torch.isfinite(ours) == torch.isfinite(plain)).all())
    off = _largest((ours.double() - oracle)[finite])
    allowed = _largest((plain.double() - oracle)[finite])
    scale = max(_largest(oracle[finite]), least_scale)
    limit = 2 * allowed + FLOOR_ROUNDINGS * torch.finfo(ours.dtype).eps * scale
    right = same and off <= limit
    text = (
        f"{kernel.name}: {what} of {name_of(problem.spec)}: largest error {off:.3e} of float64, "
        f"the reference's {allowed:.3e}, limit {limit:.3e}"
    )
    text += "" if same else ", NaN or infinite on one side only"
    log.log(logging.INFO if right else logging.WARNING, "%s: %s", text, problem.spec)
    if not right:
        report.note(f"verify: {text}")
    return right


def _flat(gradients: Gradients) -> list[Tensor | None]:
    dq, dk, dv, daux = gradients
    return [dq, dk, dv, *daux]


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _largest(x: Tensor) -> float:
    finite = x[torch.isfinite(x)]
    return float(finite.abs().max()) if finite.numel() else 0.0
