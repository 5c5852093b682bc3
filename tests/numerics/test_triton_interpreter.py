"""`triton` under Triton's interpreter: every form's numbers, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from tests.numerics.interpreted import (
    ADDED,
    BF16,
    CAUSAL,
    DROP,
    F16,
    F32,
    MIN,
    SLOPES,
    WINDOW,
    captured,
    distance,
    parsed,
)
from tests.numerics.interpreter_process import Interpreter, interpreter, serve


@dataclass(frozen=True)
class Case:
    """A spec, the shapes (B, H, Hkv, Sq, Skv, D, Dv), and the names of what it captures."""

    name: str
    spec: str
    shape: tuple[int, ...] = (1, 2, 1, 37, 45, 16, 16)
    dtype: torch.dtype = F32
    aux: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    layout: str = "bhsd"
    block: tuple[int, int] | None = (16, 16)
    lists: bool = False  # of blocks, which lengths like these are not worth
    lazy: bool = False  # O scaled only where a maximum grows by 2^8
    packed: bool = False  # query heads that share a KV head lie in one tile
    parts: int = 1  # programs that the KV blocks of a tile are dealt to


LONG = (1, 2, 1, 60, 33, 16, 16)  # more queries than keys: rows that a window leaves empty
CASES = [
    Case("full", "score=0.25*s"),
    Case("negative scale", "score=-0.25*s", dtype=F16),
    Case("fp16, dk != dv", "score=0.25*s", (2, 2, 2, 20, 33, 40, 24), F16),
    Case("bf16, causal", f"score=0.25*s, mask={CAUSAL}", dtype=BF16),
    Case("causal, long", f"score=0.25*s, mask={CAUSAL}", LONG),
    Case("bottom right", "score=0.25*s, mask=(kv - q - Skv + Sq <= 0)"),
    Case("bottom right, dead", "score=0.25*s, mask=(kv - q - Skv + Sq <= 0), dead=zero", LONG),
    Case("window", f"score=0.25*s, mask={WINDOW}", (1, 4, 2, 50, 50, 16, 16)),
    Case("window, nan", f"score=0.25*s, mask={WINDOW}", LONG, dtype=F16),
    Case("window, zero", f"score=0.25*s, mask={WINDOW}, dead=zero", LONG),
    Case("window, constant fill", f"score=0.25*s, mask={WINDOW}, dead=score, fill=-1e9", LONG),
    Case("window, least fill", f"score=0.25*s, mask={WINDOW}, dead=score, fill={MIN}", LONG, dtype=F16),
    Case("window, added fill", f"score=0.25*s, mask={WINDOW}, dead=score, fill=s - 99.0", LONG, dtype=F16),
    Case("fill by key", f"score=0.25*s, mask={WINDOW}, dead=score, fill=-kv*0.5", LONG, BF16),
    Case("all dead, zero", "score=0.25*s, mask=(kv - q >= 99), dead=zero"),
    Case("all dead, nan", "score=0.25*s, mask=(kv - q >= 99)"),
    Case("prefix", f"score=0.25*s, mask={CAUSAL} | (kv < 12)"),
    Case("dynamic prefix", f"score=0.25*s, mask={CAUSAL} | (kv < n0)", sizes=(21,)),
    Case("chunks", f"score=0.25*s, mask={CAUSAL} & (floordiv(q, 16) <= floordiv(kv, 16))"),
    Case("dilated", f"score=0.25*s, mask={CAUSAL} & (mod(q - kv, 3) <= 0)"),
    Case("softcap", f"score=5.0*tanh(0.05*s), mask={WINDOW}", dtype=F16),
    Case("alibi", f"score=0.25*s + {SLOPES}*(kv - q), mask={CAUSAL}", aux=("slopes",), dtype=F16),
    Case("alibi by key", f"score=0.25*s + {SLOPES}*kv, mask={CAUSAL}", aux=("slopes",), dtype=F16),
    Case("alibi both sides", f"score=0.25*s - {SLOPES}*abs(q - kv)", aux=("slopes",), dtype=F16),
    Case("alibi, Dv 80", f"score=0.25*s + {SLOPES}*(kv - q)", (1, 2, 1, 9, 20, 24, 80), BF16, ("slopes",)),
    Case("relu(x) - 0.5 x, large", "score=max(20.0*s + load(0, b, h, q, kv), 0) - 10.0*s - 0.5*load(0, b, h, q, kv)", aux=("bias",)),
    Case("dense bias", "score=0.25*s + load(0, b, h, q, kv)", aux=("bias",), dtype=F16),
    Case("dense bias with -inf", "score=0.25*s + load(0, b, h, q, kv)", aux=("lost_bias",)),
    Case("row and key bias", "score=0.25*s + load(0, b, q) + load(1, b, kv)", aux=("rows", "keys"), dtype=F16),
    Case(
        "bias with -inf under a mask",
        f"score=0.25*s + load(0, b, h, q, kv), mask={WINDOW}, dead=score, fill=-1e4",
        LONG,
        aux=("lost_bias",),
    ),
    Case(
        "relative bias",
        "score=0.25*s + load(0, h, max(min(kv - q, 7), -7) + 7)",
        aux=("relative",),
    ),
    Case("temperature by row", "score=s*load(0, b, q)", aux=("rows",)),
    Case("key mask, zero", "score=0.25*s, mask=load(0, b, 0, 0, kv) != 0, dead=zero", (2, 2, 1, 9, 45, 16, 16), aux=("padding",)),
    Case("key mask, least fill", f"score=0.25*s, mask=load(0, b, 0, 0, kv) != 0, dead=score, fill={MIN}", (2, 2, 1, 9, 45, 16, 16), aux=("padding",)),
    Case("no key, least fill", f"score=0.25*s, mask=load(0, b, 0, 0, kv) != 0, dead=score, fill={MIN}", (2, 2, 1, 9, 45, 16, 16), aux=("nothing",)),
    Case("row mask", "score=0.25*s, mask=load(0, b, q) > 0.0, dead=zero", aux=("rows",)),
    Case("documents", f"score=0.25*s, mask=(load(0, b, q) == load(0, b, kv)) & {CAUSAL}", (1, 2, 1, 45, 45, 16, 16), aux=("documents",)),
    Case("dense mask", "score=0.25*s, mask=load(0, 0, 0, q, kv) != 0, dead=zero", aux=("dense",)),
    Case("sink", f"score=0.25*s, mask={WINDOW}, sinks=[{SLOPES}]", (1, 2, 1, 50, 50, 16, 16), aux=("slopes",), dtype=F16),
    Case("sink, dead rows", f"score=0.25*s, mask={WINDOW}, sinks=[{SLOPES}]", LONG, aux=("slopes",), dtype=F16),
    Case("two sinks, one per row", "score=0.25*s, sinks=[0.0, load(0, b, q)]", aux=("rows",), dtype=F16),
    Case("one query", "score=0.25*s, mask=(kv - q - Skv + Sq <= 0)", (1, 4, 1, 1, 50, 16, 16)),
    Case("one key", "score=0.25*s", (1, 2, 1, 5, 1, 16, 16)),
    Case("even lengths", f"score=0.25*s, mask={CAUSAL}", (1, 2, 1, 32, 32, 16, 16)),
    Case("head dim 8", "score=0.25*s", (1, 2, 1, 9, 20, 8, 8)),
    Case("head dim 96", "score=0.25*s", (1, 1, 1, 9, 20, 96, 192), BF16),
    Case("[B, S, H, D]", f"score=0.25*s, mask={CAUSAL}, out_order=bqhd", layout="bshd"),
    Case("transposed", f"score=0.25*s, mask={CAUSAL}", layout="bhds"),
    Case("every other", "score=0.25*s, out_order=qbhd", layout="strided"),
    Case("shipped tiles", f"score=0.25*s, mask={WINDOW}", (1, 2, 1, 150, 150, 16, 16), block=None),
    Case("large scores", "score=40.0*s"),
    Case("float32, nearly equal large scores", "score=s", layout="near"),
    Case("float32, nearly equal large scores, lazy, split", "score=s", layout="near", lazy=True, parts=2),
    Case("inf in q", "score=0.25*s", layout="infinite", dtype=F16),
    Case("documents, lists", f"score=0.25*s, mask=(load(0, b, q) == load(0, b, kv)) & {CAUSAL}", (2, 2, 1, 75, 75, 16, 16), aux=("documents",), lists=True),
    Case("documents, lists, wide keys", "score=0.25*s, mask=(load(0, b, q) == load(0, b, kv))", (1, 2, 1, 64, 64, 16, 16), aux=("documents",), block=(16, 32), lists=True),
    Case("key mask, lists", "score=0.25*s, mask=load(0, b, 0, 0, kv) != 0, dead=zero", (2, 2, 1, 9, 45, 16, 16), aux=("padding",), lists=True),
    Case("dense mask by head, least fill, lists", f"score=0.25*s, mask=(load(0, h, q, kv) != 0) & {CAUSAL}, dead=score, fill={MIN}", (2, 2, 1, 50, 40, 16, 16), aux=("dense_by_head",), lists=True),
    Case("tiles with holes, lists", "score=0.25*s, mask=(mod(floordiv(q, 4), 4) - mod(floordiv(kv, 4), 4) <= 0) & (mod(q - kv, 2) <= 0)", (1, 2, 1, 70, 45, 16, 16), lists=True),
    Case("masks of heads and batches, lists", "score=0.25*s, mask=(load(0, b, h) > kv) & (kv < n0)", (2, 2, 1, 37, 45, 16, 16), aux=("lengths",), sizes=(40,), lists=True),
    Case("lazy", "score=0.25*s", lazy=True, dtype=F16),
    Case("lazy, large scores", "score=40.0*s", lazy=True),
    Case("lazy, fp16, growing by keys", "score=0.25*s + 3.0*kv", dtype=F16, lazy=True),
    Case("lazy, -inf and the least", "score=0.25*s + load(0, b, h, q, kv)", aux=("lost_bias",), lazy=True),
    Case("lazy, window, least fill", f"score=0.25*s, mask={WINDOW}, dead=score, fill={MIN}", LONG, lazy=True, dtype=F16),
    Case("lazy, sink, dead rows", f"score=0.25*s, mask={WINDOW}, sinks=[{SLOPES}]", LONG, aux=("slopes",), lazy=True, dtype=F16),
    Case("lazy, inf in q", "score=0.25*s", layout="infinite", lazy=True),
    Case("dropout", f"score=0.25*s, weight={DROP}", (2, 2, 1, 37, 45, 16, 16), aux=("seed",)),
    Case("dropout, causal, bf16", f"score=0.25*s, mask={CAUSAL}, weight={DROP}", (2, 2, 1, 64, 64, 16, 16), BF16, aux=("seed",)),
    Case("dropout, window, zero", f"score=0.25*s, mask={WINDOW}, dead=zero, weight={DROP}", LONG, aux=("seed",)),
    Case("dropout, window, least fill", f"score=0.25*s, mask={WINDOW}, dead=score, fill={MIN}, weight={DROP}", LONG, aux=("seed",)),
    Case("dropout and a sink", f"score=0.25*s, mask={CAUSAL}, sinks=[load(1, 0, h, 0, 0)], weight={DROP}", aux=("seed", "slopes")),
    Case("dropped scores", f"score=0.25*s + {DROP}, mask={CAUSAL}", aux=("seed",)),
    Case("mask after the softmax", "score=0.25*s, weight=where(load(0, 0, 0, q, kv) != 0, 1, 0)", aux=("dense",)),
    Case("gate after the softmax", "score=0.25*s, weight=load(0, b, h, q, kv)*load(1, b, kv)", aux=("bias", "keys")),
    Case("weight of a head", f"score=0.25*s, mask={CAUSAL}, weight={SLOPES} + 1", aux=("slopes",)),
    Case("sigmoid", "normalize=none, score=sigmoid(0.25*s - 2.0)"),
    Case("sigmoid, bf16, causal, bias", f"normalize=none, score=sigmoid(0.25*s + load(0, b, h, q, kv)), mask={CAUSAL}", dtype=BF16, aux=("bias",)),
    Case("relu squared, no key", f"normalize=none, score=pow(max(0.25*s, 0), 2), mask={WINDOW}", LONG),
    Case("silu, fp16, dk != dv", "normalize=none, score=0.01*s*sigmoid(0.25*s)", (2, 2, 2, 20, 33, 40, 24), F16),
    Case("decay", f"normalize=none, score=s*exp(abs(load(0, 0, h, 0, 0))*(kv - q)), mask={CAUSAL}, out_order=bqhd", layout="bshd", aux=("slopes",)),
    Case("overflow behind the mask", f"normalize=none, score=s*exp(9.0*(kv - q)), mask={CAUSAL}"),
    Case("linear, padding, dropout", f"normalize=none, score={DROP}*s, mask=load(1, b, 0, 0, kv) != 0", (2, 2, 1, 9, 45, 16, 16), aux=("seed", "padding")),
    Case("sigmoid, documents, lists", f"normalize=none, score=sigmoid(s), mask=(load(0, b, q) == load(0, b, kv)) & {CAUSAL}", (2, 2, 1, 75, 75, 16, 16), aux=("documents",), lists=True),
    Case("sigmoid, head dim 96, Dv 192", "normalize=none, score=sigmoid(0.1*s)", (1, 1, 1, 9, 20, 96, 192), BF16),
    Case("weight without s", "normalize=none, score=load(0, b, kv)", aux=("keys",)),
    Case("latent, packed", "score=0.1*s", (2, 4, 1, 5, 33, 576, 512), BF16, packed=True),
    Case("latent, causal, unpacked", f"score=0.1*s, mask={CAUSAL}", (1, 2, 1, 20, 20, 576, 512), layout="bshd"),
    Case("head dim 320", f"score=0.1*s, mask={CAUSAL}, out_order=bqhd", (1, 4, 2, 19, 21, 320, 320), BF16, layout="bshd", packed=True),
    Case("head dims 264 and 520, split", "score=0.1*s", (1, 2, 1, 3, 50, 264, 520), parts=3, packed=True),
    Case("latent, V in K", f"score=0.1*s, mask={CAUSAL}", (2, 4, 1, 5, 21, 576, 512), BF16, layout="latent", packed=True),
    Case("latent, V in K, fill, split", f"score=0.1*s, mask={WINDOW}, dead=score, fill={MIN}", (1, 2, 1, 40, 19, 272, 264), layout="latent", parts=2),
    Case("packed, causal", f"score=0.25*s, mask={CAUSAL}", (1, 6, 2, 37, 45, 16, 16), packed=True),
    Case("few queries, window by head", "score=0.25*s, mask=(kv <= q) & (q - kv <= 4*h + 4)", (1, 4, 2, 20, 45, 16, 16), block=None),
    Case("few queries, causal in some heads", "score=0.25*s, mask=(kv <= q) & ((h < 2) | (q - kv < 8))", (1, 4, 2, 20, 45, 16, 16), block=None),
    Case("packed, three heads, window, alibi", f"score=0.25*s + {SLOPES}*(kv - q), mask={WINDOW}", (1, 6, 2, 37, 45, 16, 16), aux=("slopes",), packed=True, dtype=F16),
    Case("packed, bias, one query", "score=0.25*s + load(0, b, h, 0, kv)", (2, 4, 1, 1, 45, 16, 16), aux=("bias",), packed=True),
    Case("packed, temperature by row, sink", f"score=s*load(0, b, q), sinks=[load(1, 0, h, 0, 0)], mask={CAUSAL}", (1, 4, 2, 20, 45, 16, 16), aux=("rows", "slopes"), packed=True),
    Case("packed, dropout", f"score=0.25*s, weight={DROP}", (1, 4, 2, 20, 45, 16, 16), aux=("seed",), packed=True),
    Case("packed, softmax of masks by head", "score=0.25*s, mask=(load(0, b, h) > kv), dead=zero", (2, 2, 1, 20, 45, 16, 16), aux=("lengths",), packed=True),
    Case("split", "score=0.25*s", parts=2, dtype=F16),
    Case("split, more parts than blocks, fp16", "score=0.25*s", (1, 2, 1, 9, 45, 16, 16), F16, parts=20),
    Case("split, causal, packed", f"score=0.25*s, mask={CAUSAL}", (1, 4, 2, 37, 45, 16, 16), parts=3, packed=True, dtype=F16),
    Case("split, bottom right, sink", f"score=0.25*s, mask=(kv - q - Skv + Sq <= 0), sinks=[{SLOPES}]", aux=("slopes",), parts=3, packed=True),
    Case("split, window, nan", f"score=0.25*s, mask={WINDOW}", (1, 2, 1, 30, 10, 16, 16), parts=2, dtype=F16),
    Case("split, window, zero", f"score=0.25*s, mask={WINDOW}, dead=zero", LONG, parts=2, packed=True),
    Case("split, window, least fill", f"score=0.25*s, mask={WINDOW}, dead=score, fill={MIN}", LONG, parts=3, packed=True, dtype=F16),
    Case("split, fill by key, added", f"score=0.25*s, mask={WINDOW}, dead=score, fill=s - kv*0.5", LONG, BF16, parts=2),
    Case("split, bias with -inf under a mask", f"score=0.25*s + load(0, b, h, q, kv), mask={WINDOW}, dead=score, fill=-1e4", LONG, aux=("lost_bias",), parts=3, packed=True),
    Case("split, padding, zero", "score=0.25*s, mask=load(0, b, 0, 0, kv) != 0, dead=zero", (2, 2, 1, 9, 45, 16, 16), aux=("padding",), parts=3, packed=True),
    Case("split, no key, least fill", f"score=0.25*s, mask=load(0, b, 0, 0, kv) != 0, dead=score, fill={MIN}", (2, 2, 1, 9, 45, 16, 16), aux=("nothing",), parts=3, packed=True),
    Case("split, documents, lists", f"score=0.25*s, mask=(load(0, b, q) == load(0, b, kv)) & {CAUSAL}", (2, 2, 1, 60, 75, 16, 16), aux=("documents",), lists=True, parts=2),
    Case("split, large scores, lazy", "score=40.0*s", lazy=True, parts=3),
    Case("split, inf in q", "score=0.25*s", layout="infinite", parts=2, dtype=F16),
    Case("split, sigmoid", f"normalize=none, score=sigmoid(0.25*s), mask={CAUSAL}", parts=2, packed=True),
    Case("sink of each row, filled", f"score=0.25*s, mask={WINDOW}, dead=score, fill=-2.0, sinks=[load(0, b, q)]", LONG, aux=("rows",)),
    Case("split, relu and its sums", "normalize=sums, score=max(0.25*s, 0)", parts=3, packed=True),
    Case("relu and its sums, padding", "normalize=sums, score=max(0.25*s, 0), mask=load(0, b, 0, 0, kv) != 0", (2, 2, 1, 9, 45, 16, 16), aux=("padding",)),
    Case("two masks, added", f"score=0.25*s + {ADDED}", (2, 2, 1, 9, 45, 16, 16), aux=("seen", "seen too")),
    Case("temperatures out of range", f"score=s*exp(load(0, h)), mask={CAUSAL}", (1, 4, 2, 21, 37, 16, 16), aux=("temperatures",)),
    Case("a scale below float32's", f"score=1e-46*s, mask={CAUSAL}"),
]  # fmt: skip


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> Iterator[Interpreter]:
    pytest.importorskip("triton")
    with interpreter(__name__, tmp_path_factory.mktemp("interpreter")) as run_case:
        yield run_case


@pytest.mark.parametrize("case", CASES, ids=lambda x: x.name)
def test_matches_float64(case: Case, interpreted: Interpreter) -> None:
    record = interpreted(case.name)
    assert record["same_nan"], record
    assert record["error"] <= 2 * record["error_of_reference"] + record["floor"], record
    assert record["lse_error"] <= 1e-5 * (1 + record["largest_lse"]), record
    assert record["same_inf_lse"], record
    assert record["layout"], record


def test_dead_rows_are_what_eager_makes_of_them(interpreted: Interpreter) -> None:
    """Against eager code itself: a fully masked row under finfo.min is the mean of V."""
    assert interpreted("no key, least fill")["dead_row_is_mean"]


def run(case: Case) -> dict:
    from fa3_compile.lower.choose import Problem
    from fa3_compile.lower.kernels import triton_split
    from fa3_compile.lower.kernels.reference import attention
    from fa3_compile.lower.kernels.triton_forward import TritonForward, bind_config, outputs
    from fa3_compile.lower.render import render_blocks
    from fa3_compile.lower.tiles.config import TritonConfig
    from fa3_compile.runtime.op import empty_out

    triton_split.part_count = lambda *_: case.parts
    render_blocks.WORTHWHILE = 0 if case.lists else 2**20
    torch.manual_seed(0)
    spec = parsed(case.spec, case.aux)
    batch, heads, kv_heads, q_len, kv_len, dim, v_dim = case.shape
    q, k, v = (
        laid_out(torch.randn(shape).to(case.dtype), case.layout)
        for shape in (
            (batch, heads, q_len, dim),
            (batch, kv_heads, kv_len, dim),
            (batch, kv_heads, kv_len, v_dim),
        )
    )
    if case.layout == "latent":
        v = k[..., :v_dim]
    if case.layout == "near":  # 700, 700 - 2^-10, ...: no score rounds, but 700 times log2(e) does
        q, k = torch.zeros_like(q), torch.zeros_like(k)
        q[..., 0] = 1.0
        k[..., 0] = 700 - torch.arange(kv_len) / 1024
    aux = [captured(x, case.shape) for x in case.aux]
    dtypes = tuple(x.dtype for x in aux)
    problem = Problem(spec, case.dtype, q.device, None, *case.shape, aux_dtypes=dtypes)
    kernel = TritonForward()
    assert kernel.supports(problem) is None, kernel.supports(problem)
    if case.block is None:
        out, lse = kernel.run(problem, q, k, v, aux, case.sizes)
    else:
        config = TritonConfig(*case.block, 4, 1, lazy_rescale=case.lazy, packed=case.packed)
        bound = bind_config(problem, config, q, k, v, aux, case.sizes)
        out, lse = outputs(problem, q, v)
        bound.launch([q, k, v, out, lse, *(aux[i] for i in bound.aux)])

    exact, exact_lse = attention(spec, q.double(), k.double(), v.double(), aux, case.sizes)
    rounded, _ = attention(spec, q, k, v, aux, case.sizes)
    # finfo.min absorbs the logarithm of a row's length in float32, so it shows in no lse.
    finite = torch.isfinite(exact_lse) & (exact_lse.abs() < 1e30)
    record = {
        "name": case.name,
        "same_nan": torch.equal(out.isnan(), exact.isnan()),
        "error": distance(out, exact),
        "error_of_reference": distance(rounded, exact),
        "floor": 8 * torch.finfo(case.dtype).eps * exact.nan_to_num(0.0).abs().max().item() * 0.5,
        "lse_error": distance(lse[finite], exact_lse[finite]) if finite.any() else 0.0,
        "largest_lse": exact_lse[finite].abs().max().item() if finite.any() else 0.0,
        "same_inf_lse": torch.equal(lse == float("-inf"), exact_lse == float("-inf")),
        "layout": out.stride() == empty_out(q, v, spec.out_order).stride(),
    }
    if case.name == "no key, least fill":
        mean = v.double().mean(2, keepdim=True).repeat_interleave(heads // kv_heads, 1)
        record["dead_row_is_mean"] = distance(out, mean.expand_as(out)) < 1e-6
    return record


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "bshd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "bhds":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "strided":
        wide = torch.full((*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]), float("nan"))
        wide[:, :, ::2, ::2] = x
        return wide.to(x.dtype)[:, :, ::2, ::2]
    if layout == "infinite" and x.shape[2] == 37:
        x[:, :, 3, 2] = float("inf")
        x[:, :, 7, 1] = float("nan")
    return x


if __name__ == "__main__":
    serve(CASES, run)
