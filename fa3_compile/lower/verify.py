"""`options={"verify": True}`: the reference beside every kernel, on the real inputs.

One line for every call in the log `fa3_compile.lower.verify`: INFO where the kernel is as near to
float64 as the rule of `fa3_compile.testing` asks, WARNING where it is not.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from fa3_compile.lower.choose import Kernel, Problem, reference

log = logging.getLogger(__name__)

# Roundings of the largest element that are forgiven on top of twice the reference's own error.
FLOOR_ROUNDINGS = 8


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
    wide_aux = [x.double() if x.is_floating_point() else x for x in aux]
    oracle, _ = reference().run(problem, q.double(), k.double(), v.double(), wide_aux, sizes)
    plain, _ = reference().run(problem, q, k, v, aux, sizes)
    finite = torch.isfinite(plain) & torch.isfinite(oracle)
    same = bool((torch.isfinite(out) == torch.isfinite(plain)).all())
    off = _largest((out.double() - oracle)[finite])
    allowed = _largest((plain.double() - oracle)[finite])
    scale = _largest(oracle[finite])
    limit = 2 * allowed + FLOOR_ROUNDINGS * torch.finfo(q.dtype).eps * scale
    right = same and off <= limit
    log.log(
        logging.INFO if right else logging.WARNING,
        "%s: largest error %.3e of float64, the reference's %.3e, limit %.3e%s: %s",
        kernel.name,
        off,
        allowed,
        limit,
        "" if same else ", NaN or infinite on one side only",
        problem.spec,
    )
    return right


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
