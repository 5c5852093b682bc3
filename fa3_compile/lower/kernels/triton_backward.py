"""The gradients of an attention by Triton kernels, in O(S) memory and without atomics.

The kernels' text is templates/triton/attention_backward.py.jinja. They recompute P from the LSE,
so any forward that writes the LSE of `fa3::attention` may have run before them. Gradients of
captured tensors that lack an axis come as float32 sums over it, [B, H, Sq] or [B, H, Skv]; what
is left to do for them, for sinks and for rows without a key is O(S) and done by torch.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fa3_compile.lower.binaries.build import load, source_of
from fa3_compile.lower.bound import are_small, precision
from fa3_compile.lower.choose import Gradients, KernelBuildError, Problem, reference
from fa3_compile.lower.kernels import triton_forward as forward
from fa3_compile.lower.kernels.dead_rows import loses_weights
from fa3_compile.lower.kernels.sinks import sink_cotangents
from fa3_compile.lower.kernels.triton_blocks import Lists, bind_lists
from fa3_compile.lower.kernels.triton_captured import Gathered, Layout, chained
from fa3_compile.lower.kernels.triton_dead_rows import bind_dead_rows, lose_rows
from fa3_compile.lower.kernels.triton_diagonals import DiagonalSums, bind_diagonals
from fa3_compile.lower.kernels.triton_keys import in_parts
from fa3_compile.lower.kernels.triton_launch import (
    Launch,
    bind_kernel,
    first_that_builds,
    stride_parameters,
)
from fa3_compile.lower.kernels.triton_uniform_rows import UniformRows
from fa3_compile.lower.kernels.triton_values import about_mean
from fa3_compile.lower.printers.elements import Shape
from fa3_compile.lower.printers.printer import UnprintableError
from fa3_compile.lower.render.render import aux_parameters
from fa3_compile.lower.render.render_backward import (
    BackwardKey,
    dense_loads,
    has_norm,
    is_diagonal,
    is_plain,
    key_sums,
    row_sums,
)
from fa3_compile.lower.render.render_blocks import uses_lists
from fa3_compile.lower.tiles.config import WIDEST, TritonConfig, is_wide
from fa3_compile.lower.tiles.tune_backward import Configs, table_configs
from fa3_compile.runtime.op import BackwardInputs
from fa3_compile.spec import expr as E
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.shared_loads import keys_share

log = logging.getLogger(__name__)

# What the kernels that take lists of blocks walk over.
WALKS = {"key_blocks": "q", "query_blocks": "kv"}
ROW_TERMS = TritonConfig(64, 64, 4, 2)
# Bytes of one matrix of float32 scores. Up to here eager's memory is no matter, and cuBLAS, which
# blocks float32 products far better than 32 x 32 tiles do, is taken for its gradients.
LARGE_SCORES = 2**30


@dataclass(frozen=True)
class Wanted:
    """What one backward computes: `needs` of the operator, split up."""

    q: bool
    kv: bool
    aux: tuple[int, ...]

    @classmethod
    def of(cls, needs: Sequence[bool]) -> Wanted:
        found = tuple(i for i, n in enumerate(needs[3:]) if n)
        return cls(needs[0], needs[1] or needs[2], found)


def supports_backward(problem: Problem) -> str | None:
    """None, or why these gradients are left to the reference, as a sentence."""
    spec = problem.spec
    if problem.dtype == torch.float32 and problem.device.type == "cuda":
        scores = 4 * problem.batch * problem.heads * problem.q_len * problem.kv_len
        if spec.normalized and scores < LARGE_SCORES:
            return "float32 gradients of less than 1 GiB of scores are left to cuBLAS"
    if is_wide(problem):
        return f"its gradients take head dims up to {WIDEST}, not {problem.dim}, {problem.v_dim}"
    wanted = tuple(i for i, n in enumerate(problem.aux_needs_grad) if n)
    return loses_weights(problem) or _unsupported(spec, wanted)


@functools.lru_cache(maxsize=1024)
def _unsupported(spec: AttentionSpec, wanted: tuple[int, ...]) -> str | None:
    try:
        BackwardKey(spec, 64, 64, wanted).source()
    except (UnprintableError, TypeError) as error:
        return f"an expression has no Triton text: {error}"
    return None


# What runs on tensors by the names of kernels' parameters.
Launched = Launch | Gathered | DiagonalSums | Lists | UniformRows
_launches: dict[tuple, dict[str, Launched] | None] = {}


def run_backward(problem: Problem, given: BackwardInputs) -> Gradients:
    """`Kernel.run_backward`; the reference's where nothing can be built."""
    dout, dlse, q, k, v, out, lse, aux, sizes, needs = given
    q, k, v, dout, out = (_walkable(x) for x in (q, k, v, dout, out))
    # A dLSE may be a broadcast scalar; the kernels read rows of B * H * Sq.
    dlse = None if dlse is None else dlse.to(torch.float32).contiguous()
    given = BackwardInputs(dout, dlse, q, k, v, out, lse, aux, sizes, needs)
    moved = about_mean(problem.spec, given)
    tensors = (q, k, moved.given.v, dout, moved.given.out, *aux)
    key = (
        problem.spec,
        precision(q.dtype),
        moved.given.dlse is None,
        tuple(needs),
        tuple(sizes),
        *((x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15) for x in tensors),
    )
    if key not in _launches:
        if len(_launches) >= forward.LARGEST_BOUND:
            _launches.clear()
        _launches[key] = _launches_or_none(problem, moved.given)
    launches = _launches[key]
    if launches is None:
        return reference().run_backward(problem, given)
    return compute(problem, launches, moved.given, moved.of_delta)


def _walkable(x: Tensor) -> Tensor:
    """Offsets within a tile are 32-bit."""
    return x.contiguous() if max(x.stride()[2:]) >= forward.LARGEST_STRIDE else x


def _launches_or_none(problem: Problem, given: BackwardInputs) -> dict[str, Launched] | None:
    dout, _, q, k, v, out, _, aux, sizes, _ = given
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        return None
    if any(x.device != q.device for x in (k, v, dout, out, *aux)):
        return None
    if not are_small([*sizes, *(n for x in aux for n in x.shape)]):
        return None
    if supports_backward(problem) is not None:  # the lengths were hints when it was asked
        return None
    try:
        return bind(problem, table_configs(problem), given)
    except KernelBuildError as error:
        log.warning(
            "the Triton backward could not be built for %s, head dims %d and %d, the reference "
            "runs instead: %s", problem.spec, problem.dim, problem.v_dim, error
        )  # fmt: skip
        return None


def source(problem: Problem) -> str:
    """`Kernel.backward_source`."""
    wanted = tuple(i for i, n in enumerate(problem.aux_needs_grad) if n)
    key = render_key(problem, wanted, uses_lists(problem.spec, problem.q_len, problem.kv_len))
    load(key)
    return source_of(key)


def compute(
    problem: Problem,
    launches: Mapping[str, Launched],
    given: BackwardInputs,
    of_delta: Tensor | None = None,
) -> Gradients:
    """The gradients, by kernels of `bind` for tensors like these, whose delta lacks `of_delta`."""
    _, dlse, q, k, _, _, lse, _, _, needs = given
    wanted = Wanted.of(needs)
    tensors = tensors_of(problem, given)
    if problem.spec.sums:  # of the rows' weights: their gradient is that of every weight
        tensors["delta_ptr"] = torch.zeros_like(lse) if dlse is None else -dlse
    for launch in launches.values():
        launch(tensors)
    if of_delta is not None:
        tensors["delta_ptr"] += of_delta
    if problem.spec.normalized and (wanted.kv or wanted.q):
        lose_rows(problem, tensors, q, k, lse)
    dq, dk, dv = (tensors[f"{x}_ptr"] if n else None for x, n in zip(("dq", "dk", "dv"), needs[:3]))
    return dq, dk, dv, _captured(problem, tensors, given)


def tensors_of(problem: Problem, given: BackwardInputs) -> dict[str, Tensor]:
    """What the kernels read and, made anew, what they write, by the names of their parameters."""
    dout, dlse, q, k, v, out, lse, aux, _, _ = given
    tensors = _outputs(problem, given)
    tensors |= {"q_ptr": q, "k_ptr": k, "v_ptr": v, "out_ptr": out, "dout_ptr": dout}
    tensors |= {"lse_ptr": lse, "dlse_ptr": lse if dlse is None else dlse}
    return tensors | {f"aux{i}": x for i, x in enumerate(aux)}


def _outputs(problem: Problem, given: BackwardInputs) -> dict[str, Tensor]:
    q, k, v, aux = given.q, given.k, given.v, given.aux
    spec, wanted = problem.spec, Wanted.of(given.needs)
    batch, heads, q_len, _ = q.shape
    rows = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
    found = {"delta_ptr": rows((batch, heads, q_len)), "dq_ptr": torch.empty_like(q)}
    found |= {"dk_ptr": torch.empty_like(k), "dv_ptr": torch.empty_like(v)}
    found["norm_ptr"] = found["delta_ptr"]
    if has_norm(render_key(problem, wanted.aux)):
        found["norm_ptr"] = rows((batch, heads, q_len))
    if spec.dead == "score":
        found["dead_ptr"] = torch.empty((batch, heads, q_len), dtype=torch.int8, device=q.device)
    for i, _ in enumerate(row_sums(spec, wanted.aux)):
        found[f"row_sum{i}_ptr"] = rows((batch, heads, q_len))
    for i, _ in enumerate(key_sums(spec, wanted.aux)):
        found[f"key_sum{i}_ptr"] = rows((batch, heads, k.shape[2]))
    lengths = {"b": batch, "h": heads, "q": q_len, "kv": k.shape[2]}
    for i, x in enumerate(dense_loads(spec, wanted.aux)):
        if not is_plain(spec, x):
            continue
        tensor = aux[x.tensor]
        covered = all(n == lengths.get(str(at), 1) for n, at in zip(tensor.shape, x.index))
        make = torch.empty_like if covered else torch.zeros_like
        found[f"dense{i}_ptr"] = make(tensor)
    return found


def _captured(
    problem: Problem, tensors: Mapping[str, Tensor], given: BackwardInputs
) -> list[Tensor | None]:
    """The gradients of the captured tensors, from what the kernels wrote."""
    _, _, q, k, _, _, lse, aux, sizes, needs = given
    spec, wanted = problem.spec, Wanted.of(needs)
    if not wanted.aux:
        return [None] * len(aux)
    shape = Shape(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    parts: list[tuple[E.Expr, Tensor]] = []
    for i, x in enumerate(row_sums(spec, wanted.aux)):
        parts.append((x, tensors[f"row_sum{i}_ptr"].unsqueeze(3)))
    for i, x in enumerate(key_sums(spec, wanted.aux)):
        parts.append((x, tensors[f"key_sum{i}_ptr"].unsqueeze(2)))
    if any(x.tensor in wanted.aux for x in E.loads_in(*spec.sinks)):
        parts += sink_cotangents(spec, lse, tensors["delta_ptr"], shape, aux, sizes)
    own, gathered = {}, {}
    for i, x in enumerate(dense_loads(spec, wanted.aux)):
        if (grad := tensors.get(f"dense{i}_grad")) is None:
            own[x.tensor] = tensors[f"dense{i}_ptr"]
        else:
            gathered[x.tensor] = gathered.get(x.tensor, 0) + grad
    grads: list[Tensor | None] = [None] * len(aux)
    for i in wanted.aux:
        grads[i] = own.get(i)
        if i not in own:
            total = chained(parts, spec, shape, i, aux, sizes) + gathered.get(i, 0)
            grads[i] = total.to(aux[i].dtype)
    return grads


def bind(problem: Problem, configs: Configs, given: BackwardInputs) -> dict[str, Launched]:
    """The kernels for the shapes and strides of these tensors, by name, in order of launching.

    A configuration that does not build gives way to smaller ones; KernelBuildError where none
    is left.
    """
    _, dlse, q, k, _, _, _, aux, sizes, needs = given
    spec, wanted = problem.spec, Wanted.of(needs)
    lists = uses_lists(spec, q.shape[2], k.shape[2])
    module = load(render_key(problem, wanted.aux, lists))
    rows = q.new_empty(q.shape[:3], dtype=torch.float32)  # aligned, whatever a call's is
    tensors = tensors_of(problem, given._replace(lse=rows, dlse=rows))
    tensors |= {x: q.new_empty(1, dtype=torch.int32) for x in ("lists_ptr", "counts_ptr")}
    integers = _integers(problem, tensors, q, k, aux, sizes)
    constants = {
        "GROUP": q.shape[1] // k.shape[1],
        "DEAD_ROWS": forward.may_have_dead_rows(spec, q.shape[2], k.shape[2]),
        "HAS_DLSE": dlse is not None,
        "PRECISION": precision(q.dtype),
    }
    queries = problem_grid(q, "query")
    keys = problem_grid(k, "key")
    plan: list[tuple[str, TritonConfig, Callable[[TritonConfig], int]]] = []
    if spec.normalized:
        # With two products in it, it has the registers of a walk over keys.
        plan.append(("row_terms", ROW_TERMS if q.element_size() == 2 else configs.queries, queries))
    if wanted.q or row_sums(spec, wanted.aux) or keys_share(spec, wanted.aux):
        plan.append(("query_blocks", configs.queries, queries))
    if wanted.kv or key_sums(spec, wanted.aux):
        plan.append(("key_blocks", configs.keys, keys))
    built = functools.partial(bind_kernel, tensors=tensors, integers=integers, constants=constants)
    found: dict[str, Launched] = {}
    for name, config, grid in plan:
        kernel = getattr(module, name)

        def bind_it(config: TritonConfig, kernel=kernel, name=name, grid=grid):
            before = None
            if lists and name in WALKS:
                before = bind_lists(spec, WALKS[name], config, q, k, aux, sizes)
            return before, built(kernel, config, grid(config))

        before, launch = first_that_builds(bind_it, config)
        if before is not None:
            found[f"{name} lists"] = before
        found[name] = launch
    shape = Shape(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    for i, x in enumerate(dense_loads(spec, wanted.aux)):
        name = f"dense{i}"
        bind_dense = functools.partial(
            bind_diagonals if is_diagonal(x) else _bind_dense, getattr(module, name), name, x, spec,
            shape, tuple(sizes), tensors, integers, constants,
        )  # fmt: skip
        found[name] = first_that_builds(bind_dense, dense_config(configs, x))
    if wanted.kv or wanted.q:
        if (dead_rows := bind_dead_rows(spec, tensors)) is not None:
            found["dead_rows"] = dead_rows
    return found


def _bind_dense(
    kernel, name: str, x: E.load, spec, shape: Shape, sizes, tensors, integers, constants, config
) -> Launch | Gathered:
    layout = Layout(x, shape, config.block_q, config.block_kv)
    extents = layout.extents(spec)
    if extents[0].place != "own":  # any float32 tensor: the scratch memory is made for each run
        tensors = {**tensors, f"{name}_ptr": tensors["lse_ptr"]}
    launches = [
        bind_kernel(
            kernel, config, layout.programs(each), tensors,
            integers | layout.integers(each), constants | {"PLACE": each.place},
        )
        for each in extents
    ]  # fmt: skip
    if extents[0].place == "own":
        return launches[0]
    return Gathered(name, layout, spec, sizes, tuple(zip(extents, launches)))


def dense_config(configs: Configs, x: E.load) -> TritonConfig:
    """The tile of the kernel that writes the gradient of a load of queries and keys."""
    return configs.diagonals if is_diagonal(x) else configs.dense or configs.queries


def render_key(problem: Problem, wanted: tuple[int, ...], lists: bool = False) -> BackwardKey:
    """The source that a problem needs; `wanted` are the captured tensors with a gradient."""
    return BackwardKey(
        problem.spec,
        problem.dim,
        problem.v_dim,
        wanted,
        fast_tanh=problem.dtype.itemsize == 2 and not forward.interpreted(),
        upcast=problem.dtype == torch.bfloat16 and forward.interpreted(),
        lists=lists,
        renormalised=problem.spec.normalized and problem.dtype == torch.float32,
        parts=in_parts(problem),
    )


def problem_grid(x: Tensor, axis: str) -> Callable[[TritonConfig], int]:
    """Programs of a kernel that owns tiles of x [B, heads, length, dim]."""

    def programs(config: TritonConfig) -> int:
        block = config.block_q if axis == "query" else config.block_kv
        return -(-x.shape[2] // block) * x.shape[0] * x.shape[1]

    return programs


def _integers(problem, tensors, q, k, aux, sizes) -> dict[str, int]:
    """Every integer parameter of the kernels by its name."""
    found = {"B": q.shape[0], "H": q.shape[1], "Sq": q.shape[2], "Skv": k.shape[2]}
    found |= stride_parameters(tensors)
    for used in aux_parameters(problem.spec):
        x = aux[used.tensor]
        values = [x.stride(d) for d in used.strides] + [x.shape[d] for d in used.sizes]
        found |= dict(zip(used.integers, values))
    for name, x in tensors.items():
        if name.startswith("dense"):
            name = name.removesuffix("_ptr")
            found |= {f"{name}_stride{d}": n for d, n in enumerate(x.stride())}
    return found | {f"n{i}": n for i, n in enumerate(sizes[: problem.spec.size_count])}
