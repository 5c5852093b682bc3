"""The kernels of one attention as one Python function, written for its launches.

A call's time on the host is that of its launches, of two allocations and of the interpreter's
steps in between; so the function is straight-line code, with nothing looked up, looped over or
written that does not change from call to call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fa3_compile.lower.launch.launch_cuda import (
    Counters,
    Launch,
    driver,
    empty_cuda,
    ensure_context,
)
from fa3_compile.lower.launch.launch_graph import LEAST, OfStreams, launch_graph
from fa3_compile.lower.launch.stream_reports import numbers, stream_reports
from fa3_compile.lower.launch.stream_scratch import BYTES, stream_scratch
from fa3_compile.runtime.launch import General

ALIGNMENT = 256  # of scratch memory


class Launches:
    """A function of (q, k, v, aux) that gives (out [B,H,Sq,Dv], LSE [B,H,Sq] in float32).

    device    index of the CUDA device
    launches  its kernels in their order; names as launch_cuda.NAMES has them
    scratch   bytes of memory for what one kernel leaves another
    lists     how many of them, from the first on, are lists of blocks that the first kernel makes
              of captured tensors alone: equal calls of one graph may share them
    tells     whether, of a call that makes lists, the last kernel tells the host if captured
              tensors alone leave it nothing to do: calls that share the lists go without it, once
              they know
    counters  of the module, where a kernel takes its tiles from a counter
    known     addresses that are the same in every call
    joint     whether V begins where K does, in every call
    """

    def __init__(
        self,
        device: int,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        launches: Sequence[Launch],
        scratch: int = 0,
        lists: int = 0,
        tells: bool = False,
        counters: Counters | None = None,
        known: Mapping[str | int, int] = {},
        joint: bool = False,
    ) -> None:
        self.device, self.dtype, self.shape, self.strides = device, dtype, shape, strides
        self.launches, self.scratch = tuple(launches), -(-scratch // ALIGNMENT) * ALIGNMENT
        self.lists, self.tells, self.counters, self.known = lists, tells, counters, known
        self.joint = joint
        self._call = self.fixed(None)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, aux: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        return self._call(q, k, v, aux)

    def fixed(self, otherwise: General | None, lse: bool = True) -> General:
        """A function of its own, which takes sizes too and looks at nothing of its arguments but
        their addresses. Its last argument may be a list, empty at first, that is given to calls
        with the same captured tensors while nobody writes to these: lists of blocks are left there.

        otherwise  what is called where an address is no multiple of 16, or V is not `joint`; None:
                   that is as it was when the kernels were bound
        lse        whether the LSE is wanted; None comes in its place, and it needs no tensor
        """
        rows = self.shape[1] * self.shape[2]
        scratch = self.scratch + (0 if lse else 4 * self.shape[0] * rows)
        kept = 0 < scratch <= BYTES
        at = [[x for x in launch.places if x[1] not in self.known] for launch in self.launches]
        named = {x for places in at for _, x, _ in places}
        structure = tuple(tuple((n // 8, x, bool(m)) for n, x, m in places) for places in at)
        counted = self.counters is not None and "counter" in named
        flags = otherwise is not None, lse, counted, bool(scratch), kept, bool(self.lists)
        first = 1 if self.lists else 0
        # What is called otherwise is bound anew for each length of a cache: not worth a graph.
        graphed = otherwise is not None and len(self.launches) - first >= LEAST
        flags = *flags, self.tells, self.joint, graphed
        text = written(structure, *flags)
        device = self.device

        def elsewhere(call, *arguments):
            with torch.cuda.device(device):
                return call(*arguments)

        def parameters(stream: int):
            blocks = [launch.block(self.known) for launch in self.launches]
            parts = [part for x in blocks for part in x[:2]]
            if graphed:
                ensure_context(device)
                parts += launch_graph(self.launches[first:], blocks[first:], stream)
            return (*parts, blocks)

        def own_counter() -> tuple[int, Tensor]:
            zero = torch.zeros(1, dtype=torch.int32, device="cuda")
            return zero.data_ptr(), zero

        def own_scratch() -> tuple[int, Tensor]:
            words = empty_cuda((scratch // 4,), (1,), torch.int32)
            return words.data_ptr(), words

        def own_lists() -> tuple[int, Tensor]:
            words = empty_cuda((-(-self.lists // 4),), (1,), torch.int32)
            return words.data_ptr(), words

        values: dict[str, Any] = {
            "device": device,
            "get_device": torch._C._cuda_getDevice,
            "raw_stream": torch._C._cuda_getCurrentRawStream,
            "capturing": torch._C._cuda_isCurrentStreamCapturing,
            "empty": empty_cuda,
            "elsewhere": elsewhere,
            "otherwise": otherwise,
            "shape": self.shape,
            "strides": self.strides,
            "dtype": self.dtype,
            "lse_shape": self.shape[:3],
            "lse_strides": (rows, self.shape[2], 1),
            "float32": torch.float32,
            "lse_at": self.scratch,
            "counters": self.counters,
            "scratch_of": stream_scratch(device) if kept else None,
            "own_counter": own_counter,
            "own_scratch": own_scratch,
            "own_lists": own_lists,
            "reports": stream_reports(device) if self.tells else None,
            "numbers": numbers,
            "blocks": OfStreams() if graphed else [],
            "parameters": parameters,
            "launch": driver().cuLaunchKernel,
            "set_node": driver().cuGraphExecKernelNodeSetParams,
            "go": driver().cuGraphLaunch,
            "success": driver().CUresult.CUDA_SUCCESS,
        }
        for i, launch in enumerate(self.launches):
            for name, value in zip(ARGUMENTS, launch.arguments):
                values[f"{name}{i}"] = value
            values[f"again{i}"] = launch.again
            for j, (_, _, more) in enumerate(at[i]):
                values[f"more{i}_{j}"] = more
        names = tuple(sorted(values))
        return _maker(text, names)(*(values[x] for x in names))


ARGUMENTS = ("kernel", *(f"{x}_{axis}" for x in ("grid", "threads") for axis in "xyz"), "shared")
OWN_SCRATCH = "scratch_, words = own_scratch()"
Structure = tuple[tuple[tuple[int, "str | int", bool], ...], ...]


@functools.lru_cache(maxsize=256)
def written(
    launches: Structure,
    checked: bool,
    lse: bool,
    counted: bool,
    scratch: bool,
    kept: bool,
    lists: bool,
    tells: bool,
    joint: bool,
    graphed: bool,
) -> str:
    """The function's text; shapes, grids and addresses are variables around it.

    launches  of each the words of its parameters that a call writes: (word, address, whether
              bytes are added to it)
    checked   whether addresses are looked at
    kept      whether the scratch memory is the stream's
    lists     whether the first launch makes lists, which may be shared: (stream, address, its
              memory, the number that the last kernel was given)
    tells     whether the last launch may be left out
    joint     whether V has to begin where K does
    graphed   whether those that do not make lists are one graph
    """
    captured = sorted({x for places in launches for _, x, _ in places if isinstance(x, int)})
    inputs = ["q_", "k_", "v_", *(f"aux{i}_" for i in captured)]
    lines = [
        "if get_device() != device:",
        "    return elsewhere(call, q, k, v, aux, sizes, shared)",
    ]
    lines += [f"{x}_ = {x}.data_ptr()" for x in "qkv"]
    lines += [f"aux{i}_ = aux[{i}].data_ptr()" for i in captured]
    if checked:
        apart = " or k_ != v_" if joint else ""
        lines += [f"if ({' | '.join(inputs)}) & 15{apart}:"]
        lines += ["    return otherwise(q, k, v, aux, sizes)"]
    lines += ["stream = raw_stream(device)", "out = empty(shape, strides, dtype)"]
    lines += ["out_ = out.data_ptr()"]
    if lse:
        lines += ["lse = empty(lse_shape, lse_strides, float32)", "lse_ = lse.data_ptr()"]
    if scratch and not kept:
        lines += [OWN_SCRATCH]
    if counted or kept or tells or graphed:
        lines += ["apart = False"] if graphed else []
        lines += ["try:", "    if capturing():", "        raise LookupError"]
        lines += ["    counter_ = counters[stream]"] if counted else []
        lines += ["    report_, told = reports[stream]"] if tells else []
        lines += ["    spare = scratch_of[stream]", "    scratch_ = spare.pop()"] if kept else []
        lines += ["except LookupError:"]
        lines += ["    apart = True"] if graphed else []
        lines += ["    counter_, zero = own_counter()"] if counted else []
        lines += ["    report_ = 0"] if tells else []
        lines += [f"    {OWN_SCRATCH}", "    spare = []"] if kept else []
    body = ["lse_ = scratch_ + lse_at"] if not lse else []
    if lists:
        body += ["number_ = 0", "found = bool(shared) and shared[0] == stream"]
        body += ["if found:", "    lists_ = shared[1]"]
        body += ["elif shared is None:", "    lists_ = scratch_"]
        body += ["else:", "    lists_, made = own_lists()"]
        body += ["    number_ = report_ and next(numbers)"] if tells else []
    free = "mine" if graphed else "blocks"
    body += ["mine = blocks[stream]"] if graphed else []
    body += ["try:", f"    block = {free}.pop()"]
    body += ["except IndexError:", "    block = parameters(stream)"]
    count = len(launches)
    parts = [f"words{i}, pointer{i}, " for i in range(count)]
    first = 1 if lists else 0
    if graphed:
        parts += ["graph, ", *(f"node{i}, values{i}, " for i in range(first, count))]
    body += [f"{''.join(parts)}_ = block"]
    given = [_given(i, places) for i, places in enumerate(launches)]
    steps = [_launched(i) for i in range(count)]
    if lists:
        step = [*given[0], *steps[0]]
        step += ["if shared is not None:", "    shared[:] = stream, lists_, made, number_"]
        body += ["if not found:", *_indented(step)]
    if tells:
        body += ["asks = not (found and report_ and told[0] == shared[3])"]
        given[-1], steps[-1] = (["if asks:", *_indented(x[-1])] for x in (given, steps))
    if graphed:
        body += [line for step in given[first:] for line in step]
        body += [f"if apart or graph is None{' or not asks' if tells else ''} or ("]
        body += [f"    set_node(graph, node{i}, values{i})[0] is not success or"
                 for i in range(first, count)]  # fmt: skip
        body += ["    go(graph, stream)[0] is not success", "):"]
        body += _indented([line for step in steps[first:] for line in step])
    else:
        body += [line for i in range(first, count) for line in (*given[i], *steps[i])]
    body += [f"{free}.append(block)"]
    if kept:
        body = ["try:", *(f"    {x}" for x in body), "finally:", "    spare.append(scratch_)"]
    lines += [*body, f"return out, {'lse' if lse else None}"]
    return "def call(q, k, v, aux, sizes=(), shared=None):\n" + "".join(f"    {x}\n" for x in lines)


def _given(i: int, places: Sequence[tuple[int, int | str, bool]]) -> list[str]:
    """What writes the addresses of a call into the parameters of a launch."""
    lines = []
    for j, (word, name, more) in enumerate(places):
        address = f"aux{name}_" if isinstance(name, int) else f"{name}_"
        lines += [f"words{i}[{word}] = {address}{f' + more{i}_{j}' if more else ''}"]
    return lines


def _launched(i: int) -> list[str]:
    lines = [f"status, = launch({', '.join(f'{x}{i}' for x in ARGUMENTS)}, stream, pointer{i}, 0)"]
    return [*lines, "if status is not success:", f"    again{i}(status, stream, pointer{i})"]


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"    {x}" for x in lines]


@functools.lru_cache(maxsize=256)
def _maker(text: str, names: tuple[str, ...]) -> Callable[..., General]:
    """A function of the variables that makes the function."""
    inner = text.replace("\n", "\n    ")
    code = compile(f"def make({', '.join(names)}):\n    {inner}return call\n", "<launches>", "exec")
    found: dict[str, Any] = {}
    exec(code, found)
    return found["make"]
