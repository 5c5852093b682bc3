"""The rule by which a compiled attention is right, for our tests and for yours.

The oracle is the eager code itself in float64. A compiled result, and with `training=True` each
gradient, may be at most twice as far from it as eager in the same dtype is, plus a floor of a few
roundings.

    from fa3_compile.testing import assert_matches_eager

    report = assert_matches_eager(model, input_ids, training=True)
    assert all(region.fused for region in report.regions)

`assert_fused` and `snapshot` test what became of the attention, and no numbers: see
fa3_compile/fused.py.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from fa3_compile.explaining import keyword_arguments, no_graph_caches
from fa3_compile.fused import assert_fused, snapshot
from fa3_compile.report import Report, collect

__all__ = ["assert_close_to_oracle", "assert_fused", "assert_matches_eager", "snapshot"]

# How many roundings of the largest element are forgiven on top of twice eager's own error.
FLOOR_ROUNDINGS = 8
# A gradient that is zero in exact arithmetic (a key projection's bias) is the rounding of terms as
# large as the largest gradient: its floor is that of a gradient of this share of it.
GRADIENT_SHARE = 0.25


def assert_matches_eager(
    model_or_fn: nn.Module | Callable[..., Any],
    /,
    *args: Any,
    backend: str | Callable[..., Any] = "fa3",
    options: Mapping[str, Any] | None = None,
    training: bool = False,
    dtype: torch.dtype | None = None,
    dynamic: bool | None = None,
    seed: int = 0,
    kwargs: Mapping[str, Any] | None = None,
    **named: Any,
) -> Report:
    """Compile, run beside eager and eager in float64, and compare outputs and gradients.

    args, named    the model's inputs; they, and the model, are left as they are
    kwargs         more of its keyword arguments: those whose names are taken here
    backend        that of torch.compile
    options        those of torch.compile
    training       also compare the gradient of every parameter and of every input that requires
                   one, for a fixed random cotangent of each output
    dtype          the dtype to run in; default: the model and inputs as they are
    dynamic        that of torch.compile
    seed           of `torch.manual_seed`, before each run

    Returns the report of what was fused. Raises AssertionError with the tensor that is too far
    off, by how much, and what became of each region.
    """
    if backend == "fa3":
        # By itself rather than by name: a checkout need not be installed.
        from fa3_compile.backend import fa3 as backend
    keywords = keyword_arguments(kwargs, named)
    subject = _Subject(model_or_fn, args, keywords, training, seed)
    with _wide_oracle():
        oracle = subject.run(lambda fn: fn, torch.float64)
    eager = subject.run(lambda fn: fn, dtype)
    torch._dynamo.reset()
    compiled_options: dict[str, Any] = {"options": dict(options)} if options else {}
    # On a hit of the caches nothing would be compiled that could be wrong.
    with collect() as report, no_graph_caches():
        ours = subject.run(
            lambda fn: torch.compile(fn, backend=backend, dynamic=dynamic, **compiled_options),
            dtype,
        )
    torch._dynamo.reset()
    try:
        assert_close_to_oracle(ours, eager, oracle)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{report}") from None
    return report


@dataclass
class Result:
    """What one run produced: tensors by name, outputs and gradients apart."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


@dataclass
class _Subject:
    """Something to run several times from the same state."""

    function: nn.Module | Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    training: bool
    seed: int

    def run(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]], dtype) -> Result:
        """Outputs and gradients of a fresh copy, in `dtype`."""
        function = copy.deepcopy(self.function) if isinstance(self.function, nn.Module) else None
        if function is not None and dtype is not None:
            function = function.to(dtype)
        args, kwargs = tree_map(lambda x: _fresh(x, dtype), (self.args, self.kwargs))
        leaves = {
            f"input {i}": x
            for i, x in enumerate(tree_leaves((args, kwargs)))
            if isinstance(x, Tensor) and x.requires_grad
        }
        if function is not None:
            leaves |= {n: p for n, p in function.named_parameters() if p.requires_grad}
        called = wrap(function if function is not None else self.function)
        torch.manual_seed(self.seed)
        with torch.set_grad_enabled(self.training):
            produced = called(*args, **kwargs)
        outputs = {
            f"output {i}": x for i, x in enumerate(tree_leaves(produced)) if isinstance(x, Tensor)
        }
        gradients = _gradients(outputs, leaves) if self.training else {}
        return Result({n: x.detach() for n, x in outputs.items()}, gradients)


def _fresh(value: Any, dtype: torch.dtype | None) -> Any:
    """A tensor's copy with its strides, as a leaf; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    # An expanded dimension holds one element: that one is copied, and expanded again.
    once = tuple(slice(0, 1) if s == 0 and n > 1 else slice(None) for n, s in _layout(value))
    source = value.detach()[once]
    kept = dtype if dtype is not None and value.is_floating_point() else value.dtype
    made = torch.empty_strided(source.shape, source.stride(), dtype=kept, device=value.device)
    made.copy_(source)
    return made.expand(value.shape).requires_grad_(value.requires_grad)


def _layout(value: Tensor) -> list[tuple[int, int]]:
    return list(zip(value.shape, value.stride(), strict=True))


def _gradients(outputs: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    differentiable = [x for x in outputs.values() if x.requires_grad]
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype)
        for x in differentiable
    ]
    if not differentiable or not leaves:
        return {}
    # Not torch.autograd.grad: the oracle's function mode is off while it handles a function, and a
    # checkpoint would compute again without it.
    found = _engine_run_backward(
        tuple(differentiable),
        tuple(cotangents),
        False,  # keep_graph
        False,  # create_graph
        tuple(leaves.values()),
        allow_unreachable=True,
        accumulate_grad=False,
    )
    return {f"gradient of {n}": g for n, g in zip(leaves, found) if g is not None}


def assert_close_to_oracle(ours: Result, eager: Result, oracle: Result) -> None:
    """The rule of this module. Where eager is NaN or infinite, ours has to be the same."""
    for kind in ("outputs", "gradients"):
        mine, theirs, truth = (getattr(result, kind) for result in (ours, eager, oracle))
        missing = set(theirs) ^ set(mine)
        if missing:
            raise AssertionError(f"not on both sides: {sorted(missing)}")
        whole = max((_size(x) for x in truth.values() if x.is_floating_point()), default=0.0)
        for name, expected in theirs.items():
            share = GRADIENT_SHARE * whole if kind == "gradients" else 0.0
            _assert_close(name, mine[name], expected, truth.get(name), share)


def _size(x: Tensor) -> float:
    finite = x[torch.isfinite(x)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _assert_close(name: str, ours: Tensor, eager: Tensor, oracle: Tensor | None, share: float):
    if ours.shape != eager.shape or ours.dtype != eager.dtype:
        raise AssertionError(
            f"{name} is {tuple(ours.shape)} {ours.dtype}, "
            f"eager's {tuple(eager.shape)} {eager.dtype}"
        )
    if not eager.is_floating_point():
        if not torch.equal(ours, eager):
            raise AssertionError(f"{name} differs from eager's")
        return
    finite = torch.isfinite(eager)
    if not torch.equal(torch.isfinite(ours), finite):
        count = int((torch.isfinite(ours) != finite).sum())
        raise AssertionError(f"{name}: {count} elements are NaN or infinite on one side only")
    same = torch.isnan(ours) == torch.isnan(eager)
    if not bool((finite | (same & (torch.isnan(eager) | (ours == eager)))).all()):
        raise AssertionError(f"{name}: NaN and infinities differ from eager's")
    truth = oracle if oracle is not None else eager
    finite = finite & torch.isfinite(truth)
    if not bool(finite.any()):
        return
    truth = truth.double()[finite]
    off = (ours.double()[finite] - truth).abs()
    eager_off = (eager.double()[finite] - truth).abs()
    scale = max(float(truth.abs().max()), share)
    floor = FLOOR_ROUNDINGS * torch.finfo(eager.dtype).eps * scale
    for measure, distance, allowed in (
        ("largest error", off.max(), eager_off.max()),
        ("root mean square error", off.square().mean().sqrt(), eager_off.square().mean().sqrt()),
    ):
        limit = 2 * float(allowed) + floor
        if not float(distance) <= limit:
            raise AssertionError(
                f"{name}: {measure} {float(distance):.3e} of float64 eager is beyond {limit:.3e} "
                f"(eager's own is {float(allowed):.3e}, the largest value {scale:.3e})"
            )


class _Wide(TorchFunctionMode):
    """Every request for float32 inside the model becomes one for float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float:
            return args[0].double()

        def widen(x):
            return torch.float64 if x is torch.float32 else x

        kwargs = {name: widen(x) for name, x in (kwargs or {}).items()}
        return func(*map(widen, args), **kwargs)


@contextlib.contextmanager
def _wide_oracle() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Wide():
            yield
    finally:
        torch.set_default_dtype(default)
