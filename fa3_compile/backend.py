"""The entry point of `torch.compile(model, backend="fa3")`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch._functorch.config
from torch import fx


def fa3(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
):
    """Rewrites the attention of a Dynamo graph and lets Inductor compile the result.

    options   those of `fa3_compile.options.Options`; every other name is one of
              `torch._inductor.config`
    mode      as for backend="inductor"; "max-autotune" also tunes the attention kernels fully

    Raises OptionError for an unknown or ill-typed option.
    """
    from torch._dynamo.exc import RestartAnalysis
    from torch._inductor.compile_fx import compile_fx

    from fa3_compile import report
    from fa3_compile.frontend.rewrite.integer_divisors import integer_divisors_as_floats
    from fa3_compile.lower import inductor
    from fa3_compile.options import split
    from fa3_compile.pipeline import KEEPS_WEIGHTS, graphs, rewrite_attention

    ours, patches = split(options, mode)
    inductor.install()
    graph = report.enter_graph()
    rewrite_attention(gm, ours, graph, build=True)
    for module in graphs(gm):
        if integer_divisors_as_floats(module.graph):
            module.recompile()
    # Inductor leaves out a copy of weights, such as a dropout of 0, after AOTAutograd has found
    # that only the copy is returned, and the backward may write over the weights' memory.
    kept = any(module.meta.get(KEEPS_WEIGHTS) for module in graphs(gm))
    given = torch._functorch.config.patch(donated_buffer=False) if kept else nullcontext()
    try:
        with given:
            return compile_fx(gm, list(example_inputs), config_patches=patches or None)
    except RestartAnalysis:
        # A float that changes has to be compiled in: the graph comes again, with its value.
        report.leave_graph(graph)
        raise


def rewritten(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
    outputs: list[fx.Node | None] | None = None,
):
    """As `fa3`, but what it returns is the rewritten graph itself, to be run as it is.

    outputs  as for `fa3_compile.pipeline.rewrite_attention`
    """
    from fa3_compile import report
    from fa3_compile.options import split
    from fa3_compile.pipeline import rewrite_attention

    rewrite_attention(gm, split(options, mode)[0], report.enter_graph(), outputs=outputs)
    return gm


def _reset() -> None:
    """What `torch._dynamo.reset()` should also forget: recorded CUDA graphs."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


fa3.reset = _reset  # pyright: ignore[reportFunctionMemberAccess]
