"""`explain`: compile something once, run it, and report what became of its attention."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fa3_compile.report import Report, collect
from fa3_compile.source import of_frame

NOTHING_FOUND = (
    "no attention was found: in no graph is the product of two activations changed, by a softmax "
    "or otherwise, and multiplied by another. What compiled extensions (flash_attn, xformers) and "
    "TorchScript compute, and what torch.compiler.disable leaves out, is in no graph"
)


def explain(
    model_or_fn: nn.Module | Callable[..., Any],
    /,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    training: bool | None = None,
    kwargs: Mapping[str, Any] | None = None,
    **named: Any,
) -> Report:
    """Compile `model_or_fn` with backend="fa3", call it on the arguments, report what was done.

    args, named  what the model is called with
    kwargs       more of its keyword arguments: those whose names are taken here
    options      those of `torch.compile(..., backend="fa3")`
    training     False: in eval mode, without gradients. True: in training mode, and the backward
                 of the sum of all real outputs is run too; no `.grad` is written. None: as it is,
                 forward only.

    Tiles of a mask that depends on data are counted for these arguments, where what it reads is
    cheap to compute.

    Something already compiled is explained as it was before. Dynamo is reset before and after, so
    everything compiled in this process compiles again at its next call. The caches of compiled
    graphs are not used: on a hit nothing is lowered, and the report would lack each kernel's config
    and what could not be built. A training run has its side effects, such as random numbers drawn
    and batch statistics.

    Raises what the model raises.
    """
    from fa3_compile.backend import fa3

    keywords = keyword_arguments(kwargs, named)
    return explain_with(fa3, model_or_fn, args, keywords, options, training)


def keyword_arguments(kwargs: Mapping[str, Any] | None, named: Mapping[str, Any]) -> dict[str, Any]:
    """A model's keyword arguments, given as `kwargs` or by their names.

    Raises TypeError for one that is given both ways.
    """
    twice = sorted({*(kwargs or {})} & {*named})
    if twice:
        raise TypeError(f"given by name and in kwargs, leave out one: {', '.join(twice)}")
    return {**named, **(kwargs or {})}


def explain_with(
    backend: Callable[..., Any],
    model_or_fn: nn.Module | Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any] | None,
    training: bool | None,
) -> Report:
    """`explain` with another backend, which is called as Dynamo calls one, with `options`."""
    plain = getattr(model_or_fn, "_orig_mod", None)
    plain = plain or getattr(model_or_fn, "_torchdynamo_orig_callable", model_or_fn)
    torch._dynamo.reset()
    try:
        with no_graph_caches(), mode(plain, training), collect() as report:
            breaks = _GraphBreaks(backend)
            compiled = torch.compile(plain, backend=breaks.backend, options=dict(options or {}))
            start = time.perf_counter()
            output = compiled(*args, **kwargs)
            if training:
                _run_backward(plain, (args, kwargs), output, report)
            report.compile_seconds = time.perf_counter() - start
            report.graph_breaks = breaks.texts()
            if not report.regions:
                report.notes.append(NOTHING_FOUND)
        return report
    finally:
        torch._dynamo.reset()


class _GraphBreaks:
    """Notes why Dynamo broke the graph, on the way to the backend."""

    def __init__(self, compile_graph: Callable[..., Any]) -> None:
        self.compile_graph = compile_graph
        self.before = _counted_breaks()
        self.placed: dict[str, str] = {}

    def backend(self, gm: torch.fx.GraphModule, example_inputs: list[Any], **kwargs: Any) -> Any:
        ended = getattr(gm, "compile_subgraph_reason", None)
        if ended is not None and ended.graph_break:
            frame = ended.user_stack[-1] if ended.user_stack else None
            self.placed[ended.reason] = of_frame(frame) if frame else ""
        # Imported here, as the stages are: `import fa3_compile` stays quick.
        from fa3_compile import mask_tensors

        with mask_tensors.asked(gm) as kept:
            compiled = self.compile_graph(gm, example_inputs, **kwargs)
        return mask_tensors.counting(compiled, kept)

    def texts(self) -> list[str]:
        # A break before the first operation makes no graph; only the counter knows of it.
        counted = _counted_breaks() - self.before
        reasons = [*self.placed, *(reason for reason in counted if reason not in self.placed)]
        return [
            reason.partition("\n")[0]
            + (f" at {self.placed[reason]}" if self.placed.get(reason) else "")
            for reason in reasons
        ]


def _counted_breaks() -> Counter[str]:
    # Imported here, as it takes most of a second and brings Triton.
    from torch._dynamo.utils import counters

    return Counter(counters["graph_break"])


@contextmanager
def no_graph_caches() -> Iterator[None]:
    """Everything is compiled anew: Inductor's and AOTAutograd's caches are off."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config

    with (
        inductor_config.patch({"fx_graph_cache": False, "fx_graph_remote_cache": False}),
        functorch_config.patch({"enable_autograd_cache": False}),
    ):
        yield


@contextmanager
def mode(model: Any, training: bool | None) -> Iterator[None]:
    """Training or eval mode and gradients, each module's own flag restored afterwards."""
    if training is None:
        yield
        return
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    flags = [module.training for module in modules]
    if isinstance(model, nn.Module):
        model.train(training)
    try:
        with torch.set_grad_enabled(training):
            yield
    finally:
        for module, flag in zip(modules, flags):
            module.training = flag


def _run_backward(model: Any, inputs: Any, output: Any, report: Report) -> None:
    losses = [
        leaf.sum()
        for leaf in tree_leaves(output)
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad and leaf.is_floating_point()
    ]
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    wanted = [
        leaf
        for leaf in (*parameters, *tree_leaves(inputs))
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad
    ]
    if losses and wanted:
        torch.autograd.grad(losses, wanted, allow_unused=True)
    else:
        report.notes.append(
            "no backward was run: no output requires a gradient, or nothing that it could be "
            "taken for is an argument or a parameter of the model"
        )
