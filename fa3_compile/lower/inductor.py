"""Inductor lowerings of the operators, installed by `install`.

A kernel that is a program of torch operators is inlined: traced, and lowered node by node into
the code around it. Any other becomes one call that goes straight to its launch (`direct_call`),
or, with `verify`, stays a call of the operator, which runs the same choice again. Where a kernel
cannot be built, and for gradients without a kernel, the reference is inlined; a backward lowering
must not raise, because that would surface at `.backward()`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from fa3_compile import report
from fa3_compile.lower.choose import Kernel, KernelBuildError, Problem
from fa3_compile.lower.dispatch import (
    allowed_kernels,
    built,
    built_backward,
    is_direct,
    make_problem,
    wants_verification,
    widened,
)
from fa3_compile.runtime import cpu_backward, cpu_forward  # noqa: F401, called by cached code
from fa3_compile.runtime.op import BackwardInputs, split_text

log = logging.getLogger(__name__)


@functools.cache
def install() -> None:
    """Registers the lowerings; Inductor is imported here and not before."""
    from torch._inductor.lowering import register_lowering

    for op, lowering in (
        (torch.ops.fa3.attention.default, _lower_attention),
        (torch.ops.fa3.attention_backward.default, _lower_backward),
    ):
        register_lowering(op, type_promotion_kind=None)(functools.partial(_or_call, op, lowering))


def _or_call(op, lowering: Callable, *args):
    """The lowering, or the call of the operator if it fails for a reason nobody thought of."""
    from torch._inductor.lowering import fallback_handler

    try:
        lowered = lowering(*args)
    except Exception:
        log.exception("%s could not be lowered; it stays a call", op)
        lowered = None
    return fallback_handler(op, add_to_fallback_set=False)(*args) if lowered is None else lowered


def _lower_attention(q, k, v, aux, sizes, text):
    """None to leave the call."""
    fake_q, fake_k, fake_v, fake_aux, fake_sizes, _ = _fake_arguments()
    if not _known(fake_q, fake_k, fake_v, *fake_aux):
        return None
    problem = _problem(text, fake_q, fake_k, fake_v, fake_aux)
    problem = replace(problem, wants_lse=_reads_lse())
    options = split_text(text)[1]
    kernel = built(problem, allowed_kernels(options))
    ran = {"kernel": kernel.name, "config": kernel.configuration(problem)}
    report.update(str(problem.spec), kernel_source=kernel.source(problem), **ran)
    if is_direct(kernel, options, fake_aux):
        return _direct(torch.ops.fa3.attention.default, q, k, v, aux, sizes, text)
    if not kernel.inline or wants_verification(options):
        return None

    def program(q, k, v, aux, sizes):
        return kernel.run(problem, q, k, v, widened(aux), sizes)

    fakes = (fake_q, fake_k, fake_v, list(fake_aux), list(fake_sizes))
    return _inline(program, fakes, (q, k, v, list(aux), list(sizes)))


def _lower_backward(dout, dlse, q, k, v, out, lse, aux, sizes, text, needs):
    """None to leave the call."""
    fakes = _fake_arguments()
    _, _, fake_q, fake_k, fake_v, _, _, fake_aux, _, _, _ = fakes
    if not _known(fake_q, fake_k, fake_v, *fake_aux):
        return None
    problem = _problem(text, fake_q, fake_k, fake_v, fake_aux, needs)
    options = split_text(text)[1]
    kernel = built_backward(problem, allowed_kernels(options))
    _report_source(kernel, problem)
    if wants_verification(options):
        return None
    if not kernel.inline:
        op = torch.ops.fa3.attention_backward.default
        return _direct(op, dout, dlse, q, k, v, out, lse, aux, sizes, text, needs)

    def program(dout, dlse, q, k, v, out, lse, aux, sizes):
        inputs = (q, k, v, *aux)
        given = BackwardInputs(dout, dlse, q, k, v, out, lse, widened(aux), sizes, needs)
        dq, dk, dv, daux = kernel.run_backward(problem, given)
        grads = [x.new_empty(0) if g is None else g for x, g in zip(inputs, (dq, dk, dv, *daux))]
        return grads[0], grads[1], grads[2], grads[3:]

    arguments = (dout, dlse, q, k, v, out, lse, list(aux), list(sizes))
    return _inline(program, tuple(fakes[:-2]), arguments)


def _report_source(kernel: Kernel, problem: Problem) -> None:
    """Says where the source of a backward lies, if anybody asks: it has to be built for that."""
    if report.is_collected():
        # What cannot be built is said by the first call, which runs another family.
        with contextlib.suppress(KernelBuildError):
            text = kernel.backward_source(problem)
            report.update(str(problem.spec), gradients_source=text)


def _direct(op, *args):
    """One call of the kernel's launch."""
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    from fa3_compile.lower.launch.direct_call import DirectCall

    def wrapped(x):
        return ir.TensorBox.create(x) if isinstance(x, ir.IRNode) else x

    outputs = DirectCall.create(op, *args)
    if op is torch.ops.fa3.attention.default:
        # Allocated anew, however the inputs lie.
        V.graph.unaligned_buffers -= {x.get_name() for x in outputs}
        for x in outputs:
            # A bound kernel's outputs are made with these sizes; to look again takes 0.5 us each.
            x.skip_size_stride_alignment_checks = True
    return pytree.tree_map(wrapped, outputs)


def _fake_arguments() -> tuple[Any, ...]:
    """The current node's arguments as fake tensors and SymInts."""
    from torch._inductor.virtualized import V

    node = V.graph.current_node
    values = torch.fx.map_arg(node.args, lambda x: x.meta["val"])
    return tuple(list(x) if isinstance(x, (list, tuple)) else x for x in values)


def _reads_lse() -> bool:
    """Whether anything reads the second output of the current node."""
    from torch._inductor.virtualized import V

    outputs = [x for x in V.graph.current_node.users if x.target is operator.getitem]
    return len(outputs) < len(V.graph.current_node.users) or any(
        x.args[1] == 1 and len(x.users) > 0 for x in outputs
    )


def _problem(text: str, q, k, v, aux, needs: Sequence[bool] = ()) -> Problem:
    lengths = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])
    return make_problem(text, q, k, v, aux, needs, [_hint(x) for x in lengths])


def _hint(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _known(*tensors) -> bool:
    """Whether the lengths are numbers or were while tracing. One that is read from a tensor may be
    0, which the operator looks at in every call, and Inductor takes no strides made of it."""
    sizes = (size for x in tensors for size in x.shape)
    return all(isinstance(x, int) or x.node.hint is not None for x in sizes)


def _inline(program: Callable, fakes: tuple, arguments: tuple):
    """The program's outputs as Inductor IR, in the program's structure."""
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.lowering import process_subgraph_nodes
    from torch._inductor.virtualized import V

    flat_fakes, spec = pytree.tree_flatten(fakes)
    output_spec: list[pytree.TreeSpec] = []

    def flat_program(*flat):
        outputs, structure = pytree.tree_flatten(program(*pytree.tree_unflatten(flat, spec)))
        output_spec.append(structure)
        return outputs

    with V.fake_mode:
        graph = make_fx(flat_program, decomposition_table=select_decomp_table())(*flat_fakes)
    lowered = process_subgraph_nodes(graph, pytree.tree_leaves(arguments))
    return pytree.tree_unflatten(list(lowered), output_spec[-1])  # pyright: ignore
