"""`cuda_sm90` on a Hopper GPU: every form against float64, odd lengths, grouped heads, graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fa3_compile.lower.choose import Problem
from fa3_compile.lower.kernels import cuda_sm90_keys
from fa3_compile.lower.kernels.cuda_sm90 import CudaSm90
from fa3_compile.spec.attention import AttentionSpec
from tests.numerics.forms import BY_NAME, FORMS, Form, Shape, compare, inputs, shape_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="a Hopper GPU is needed",
    ),
]
LENGTHS = ((333, 421), (421, 333), (128, 512), (1, 700), (700, 50), (1027, 1027))
DIMS = ((40, 40), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (8, 24))
KERNEL = CudaSm90()


def problem(spec: AttentionSpec, shape: Shape, dtype: torch.dtype, aux) -> Problem:
    lengths = vars(shape).values()
    dtypes = tuple(x.dtype for x in aux)
    device = torch.device("cuda", torch.cuda.current_device())
    return Problem(spec, dtype, device, (9, 0), *lengths, aux_dtypes=dtypes)


def run(form: Form, shape: Shape, dtype=torch.bfloat16, layout: str = "bshd", large: bool = False):
    """large: the tiles of long inputs, which these are too short for."""
    q, k, v, aux = inputs(form, shape, dtype, "cuda", layout)
    asked = replace(problem(form.spec(), shape, dtype, aux), wants_lse=not large)
    kernel = CudaSm90() if large else KERNEL
    assert kernel.supports(asked) is None
    with pytest.MonkeyPatch.context() as patch:
        if large:
            patch.setattr(cuda_sm90_keys, "processors", lambda device: 0)
        return (*kernel.run(asked, q, k, v, aux, form.sizes), q, k, v, aux)


@pytest.mark.parametrize("form", FORMS, ids=lambda x: x.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_forms(form: Form, dtype: torch.dtype) -> None:
    n = FORMS.index(form)
    shape = shape_for(form, *DIMS[n % len(DIMS)], *LENGTHS[n % len(LENGTHS)], (1, 2, 4)[n % 3])
    large = (n + (dtype == torch.float16)) % 2 == 0
    assert compare(form, *run(form, shape, dtype, large=large)) is None


@pytest.mark.parametrize("form", FORMS, ids=lambda x: x.name)
def test_few_queries(form: Form) -> None:
    n = FORMS.index(form)
    dims, dtype = DIMS[n % len(DIMS)], (torch.bfloat16, torch.float16)[n % 2]
    for m, (q_len, kv_len) in enumerate(((1, 2011), (5, 1500), (40, 900))):
        shape = Shape(2, 8, (1, 2, 8)[(n + m) % 3], q_len, kv_len, *dims)
        assert compare(form, *run(form, shape, dtype)) is None


@pytest.mark.parametrize("group", [3, 7, 64, 71, 128])
def test_any_group_of_heads(group: int) -> None:
    for q_len in (1, 3, 20):
        shape = Shape(2, 2 * group, 2, q_len, 700, 64, 64)
        for name in ("bottom right", "alibi, no mask", "sink"):
            assert compare(BY_NAME[name], *run(BY_NAME[name], shape)) is None


def test_long_keys_and_few_large_tiles() -> None:
    for name in ("bottom right", "window", "alibi", "left padding", "dense bias", "sink"):
        shape = Shape(1, 2, 1, 300, 9000, 128, 128)
        found = run(BY_NAME[name], shape)
        assert compare(BY_NAME[name], *found) is None


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("name", ["full", "causal", "window", "left padding", "softcap"])
def test_head_dims(name: str, dims: tuple[int, int]) -> None:
    for n, lengths in enumerate(LENGTHS):
        shape = shape_for(BY_NAME[name], *dims, *lengths, (1, 2, 4)[n % 3])
        assert compare(BY_NAME[name], *run(BY_NAME[name], shape, large=n % 2 == 0)) is None


@pytest.mark.parametrize("layout", ["bshd", "bhds"])
def test_layouts_that_tensor_maps_cannot_describe_are_copied(layout: str) -> None:
    shape = Shape(2, 4, 2, 100, 120, 64, 64)
    assert compare(BY_NAME["causal"], *run(BY_NAME["causal"], shape, layout=layout)) is None
    q, k, v, aux = inputs(BY_NAME["causal"], shape, torch.bfloat16, "cuda")
    odd = torch.empty(q.numel() + 1, dtype=q.dtype, device="cuda")[1:].view(q.shape).copy_(q)
    out, lse = KERNEL.run(problem(BY_NAME["causal"].spec(), shape, q.dtype, aux), odd, k, v, [], ())
    assert compare(BY_NAME["causal"], out, lse, q, k, v, aux) is None


def test_nothing_to_attend_to_and_nobody_to_attend() -> None:
    spec = AttentionSpec.parse("attention(score=s)")
    for shape in (Shape(0, 2, 2, 5, 5, 64, 64), Shape(1, 2, 2, 0, 5, 64, 64)):
        q, k, v, _ = inputs(BY_NAME["full"], shape, torch.bfloat16, "cuda")
        out, lse = KERNEL.run(problem(spec, shape, q.dtype, []), q, k, v, [], ())
        assert out.shape == (*q.shape[:3], 64) and lse.shape == q.shape[:3]


@pytest.mark.parametrize("lengths", [(1027, 1027), (5, 3000)], ids=str)
def test_the_same_bits_in_a_thousand_runs(lengths: tuple[int, int]) -> None:
    form, shape = BY_NAME["left padding"], Shape(2, 4, 2, *lengths, 128, 128)
    q, k, v, aux = inputs(form, shape, torch.bfloat16, "cuda")
    asked = problem(form.spec(), shape, q.dtype, aux)
    first, _ = KERNEL.run(asked, q, k, v, aux, ())
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        wrong += (KERNEL.run(asked, q, k, v, aux, ())[0] != first).sum()
    assert int(wrong) == 0


@pytest.mark.parametrize("lengths", [(1027, 1027), (3, 5000)], ids=str)
def test_streams_and_graphs(lengths: tuple[int, int]) -> None:
    form, shape = BY_NAME["causal"], Shape(2, 8, 8, *lengths, 64, 64)
    q, k, v, _ = inputs(form, shape, torch.bfloat16, "cuda")
    asked = problem(form.spec(), shape, q.dtype, [])
    expected, _ = KERNEL.run(asked, q, k, v, [], ())
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    found = []
    for stream in streams * 5:
        with torch.cuda.stream(stream):
            found.append(KERNEL.run(asked, q, k, v, [], ())[0])
    torch.cuda.synchronize()
    assert all(torch.equal(x, expected) for x in found)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = KERNEL.run(asked, q, k, v, [], ())
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)
