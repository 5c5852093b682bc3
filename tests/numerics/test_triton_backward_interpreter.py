"""The Triton backward under Triton's interpreter: every form's gradients, without a GPU.

Each gradient is compared with float64 autograd through the reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

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

FAR = (1, 4, 2, 9, 400, 16, 16)
LONG = (1, 2, 1, 40, 23, 16, 16)  # more queries than keys: rows that a window leaves empty
BUCKET = "max(min(kv - q, 7), -7) + 7"
TWO = (2, 2, 1, 21, 37, 16, 16)


@dataclass(frozen=True)
class Case:
    """A spec, the shapes (B, H, Hkv, Sq, Skv, D, Dv), and the names of what it captures."""

    name: str
    spec: str
    shape: tuple[int, ...] = (1, 2, 1, 21, 37, 16, 16)
    dtype: torch.dtype = F32
    aux: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    dlse: bool = False
    block: tuple[int, int] = (16, 16)
    needs: tuple[bool, ...] = (True, True, True)
    # Of triton_captured: scratch memory, and programs below which sums are split.
    scratch: int = 2**28
    enough: int = 1
    lists: bool = False  # of blocks, which lengths like these are not worth
    ones: bool = False  # dout, so that a key's dV is what all queries give it
    # Rows with nearly all weight on one key: eager's dS is nearly 0, whatever rounds O to 16 bits.
    sharp: bool = False
    values: float = 0.0  # V's mean; its tiles are the shipped ones


CASES = [
    Case("V far from zero", "score=0.25*s", FAR, values=20.0),
    Case("V far from zero, table", f"score=0.25*s + load(0, h, {BUCKET})", FAR, aux=("relative",), values=20.0),
    Case("V far from zero, sinks by row, dLSE", "score=0.25*s, sinks=[0.0, load(0, b, q)]", FAR, aux=("rows",), dlse=True, values=20.0),
    Case("V far from zero, table, sink", f"score=0.25*s + load(0, h, {BUCKET}), sinks=[load(1, 0, h, 0, 0)]", FAR, aux=("relative", "slopes"), values=20.0),
    Case("V far from zero, large where hidden", "score=0.25*s, mask=(kv < 6)", FAR, values=20.0),
    Case("V far from zero, window, zero", f"score=0.25*s, mask={WINDOW}, dead=zero", LONG, values=200.0),
    Case("V far from zero, window, nan", f"score=0.25*s, mask={WINDOW}", LONG, values=200.0),
    Case("V far from zero, fill that absorbs s", f"score=0.25*s, mask={WINDOW}, dead=score, fill=0.25*s - 3.4028234663852886e38", LONG, values=200.0),
    Case("V far from zero, fill with s", f"score=0.25*s, mask={WINDOW}, dead=score, fill=0.25*s - 9.0", LONG, values=200.0),
    Case("V far from zero, fill and a sink", f"score=0.25*s, mask={WINDOW}, dead=score, fill=-2.0, sinks=[{SLOPES} - 4.0]", LONG, aux=("slopes",), values=200.0),
    Case("V far from zero, dropout", f"score=0.25*s, weight={DROP}", LONG, aux=("seed",), values=20.0),
    Case("full", "score=0.25*s"),
    Case("weights sum to one", "score=0.25*s + 900.0", (1, 2, 1, 70, 37, 16, 16), ones=True),
    Case("weights and a sink sum to one", f"score=0.25*s + 900.0, sinks=[{SLOPES} + 900.0]", (1, 2, 1, 70, 37, 16, 16), aux=("slopes",), ones=True),
    Case("even", "score=0.25*s", (1, 2, 2, 32, 32, 16, 16)),
    Case("negative scale", "score=-0.25*s", dlse=True),
    Case("fp16, dk != dv", "score=0.25*s", (2, 2, 2, 20, 33, 40, 24), F16),
    Case("bf16, causal", f"score=0.25*s, mask={CAUSAL}", dtype=BF16),
    Case("causal, group 4", f"score=0.25*s, mask={CAUSAL}", (2, 4, 1, 37, 37, 16, 16), dlse=True),
    Case("causal, wide keys", f"score=0.25*s, mask={CAUSAL}", (1, 2, 1, 70, 70, 16, 16), block=(16, 32)),
    Case("causal, wide queries", f"score=0.25*s, mask={CAUSAL}", (1, 2, 1, 70, 70, 16, 16), block=(32, 16)),
    Case("bottom right", "score=0.25*s, mask=(kv - q - Skv + Sq <= 0)"),
    Case("bottom right, dead", "score=0.25*s, mask=(kv - q - Skv + Sq <= 0), dead=zero", LONG),
    Case("window", f"score=0.25*s, mask={WINDOW}", (1, 2, 1, 50, 50, 16, 16)),
    Case("window, nan", f"score=0.25*s, mask={WINDOW}", LONG),
    Case("window, zero", f"score=0.25*s, mask={WINDOW}, dead=zero", LONG),
    Case("window, constant fill", f"score=0.25*s, mask={WINDOW}, dead=score, fill=-1e9", LONG),
    Case("window, least fill", f"score=0.25*s, mask={WINDOW}, dead=score, fill={MIN}", LONG, dlse=True),
    Case("fill that no row needs", f"score=0.25*s, mask={CAUSAL}, dead=score, fill=s - 99.0"),
    Case("fill that absorbs s", f"score=0.25*s, mask={WINDOW}, dead=score, fill=0.25*s - 3.4028234663852886e38", LONG, dlse=True),
    Case("fill that absorbs s, bf16", "score=0.25*s, mask=load(0, b, 0, 0, kv) != 0, dead=score, fill=0.25*s - 3.4028234663852886e38", (2, 4, 2, 9, 37, 16, 16), BF16, ("nothing",)),
    Case("fill that absorbs s, wide heads", f"score=0.25*s, mask={WINDOW}, dead=score, fill=0.25*s - 3.4028234663852886e38", (1, 2, 1, 40, 23, 72, 136)),
    Case("least fill, one tile", f"score=0.25*s, mask={CAUSAL} & (q > 3), dead=score, fill={MIN}"),
    Case("all dead, zero", "score=0.25*s, mask=(kv - q >= 99), dead=zero"),
    Case("all dead, nan", "score=0.25*s, mask=(kv - q >= 99)"),
    Case("prefix", f"score=0.25*s, mask={CAUSAL} | (kv < 12)"),
    Case("dynamic prefix", f"score=0.25*s, mask={CAUSAL} | (kv < n0)", sizes=(21,)),
    Case("chunks", f"score=0.25*s, mask={CAUSAL} & (floordiv(q, 16) <= floordiv(kv, 16))"),
    Case("dilated", f"score=0.25*s, mask={CAUSAL} & (mod(q - kv, 3) <= 0)"),
    Case("softcap", f"score=5.0*tanh(0.05*s), mask={WINDOW}", (1, 2, 1, 30, 30, 16, 16)),
    Case("clamp", "score=max(min(0.25*s, 0.5), -0.5)"),
    Case("abs and square", "score=0.1*abs(s) - 0.01*pow(s, 2)"),
    Case("where on s", "score=where(s > 0.0, 0.25*s, 0.05*s)"),
    Case("exp of s", "score=exp(0.1*s)"),
    Case("alibi", f"score=0.25*s + {SLOPES}*(kv - q), mask={CAUSAL}", aux=("slopes",)),
    Case("alibi by key, batch 2", f"score=0.25*s + {SLOPES}*kv, mask={CAUSAL}", (2, 4, 2, 21, 37, 16, 16), aux=("slopes",)),
    Case("alibi both sides, bf16", f"score=0.25*s - {SLOPES}*abs(q - kv)", (1, 2, 1, 9, 20, 24, 80), BF16, ("slopes",)),
    Case("temperature", "score=s*load(0, h)", aux=("heads",)),
    Case("0-d temperature", "score=s*load(0)", aux=("scalar",)),
    Case("dense bias", "score=0.25*s + load(0, b, h, q, kv)", aux=("bias",)),
    Case("dense bias over the batch", f"score=0.25*s + load(0, 0, h, q, kv), mask={CAUSAL}", (2, 2, 1, 21, 37, 16, 16), aux=("head_bias",)),
    Case("dense bias over heads, bf16", "score=0.25*s + load(0, b, 0, q, kv)", (2, 4, 2, 21, 20, 16, 16), BF16, ("batch_bias",)),
    Case("dense bias over both, scaled", "score=(0.25*s + load(0, q, kv))*0.5", (2, 2, 1, 21, 37, 16, 16), aux=("plain_bias",)),
    Case("dense bias with -inf", "score=0.25*s + load(0, b, h, q, kv)", aux=("masked_bias",), needs=(True, True, True, False)),
    Case("row and key bias", "score=0.25*s + load(0, b, q) + load(1, b, kv)", (2, 2, 1, 21, 37, 16, 16), aux=("rows", "keys")),
    Case("temperature by row", "score=s*load(0, b, q)", aux=("rows",)),
    Case("relative bias, no gradient", "score=0.25*s + load(0, h, max(min(kv - q, 7), -7) + 7)", aux=("relative",), needs=(True, True, True, False)),
    Case("key mask, zero", "score=0.25*s, mask=load(0, b, 0, 0, kv) != 0, dead=zero", (2, 2, 1, 9, 37, 16, 16), aux=("padding",)),
    Case("no key, least fill", f"score=0.25*s, mask=load(0, b, 0, 0, kv) != 0, dead=score, fill={MIN}", (2, 2, 1, 9, 37, 16, 16), aux=("nothing",)),
    Case("documents", f"score=0.25*s, mask=(load(0, b, q) == load(0, b, kv)) & {CAUSAL}", (1, 2, 1, 37, 37, 16, 16), aux=("documents",)),
    Case("dense mask", "score=0.25*s, mask=load(0, 0, 0, q, kv) != 0, dead=zero", aux=("dense",)),
    Case("sink", f"score=0.25*s, mask={WINDOW}, sinks=[{SLOPES}]", (2, 4, 2, 30, 30, 16, 16), aux=("slopes",), dlse=True),
    Case("sink, dead rows", f"score=0.25*s, mask={WINDOW}, sinks=[{SLOPES}]", LONG, aux=("slopes",)),
    Case("two sinks, one per row", "score=0.25*s, sinks=[0.0, load(0, b, q)]", aux=("rows",)),
    Case("one query", "score=0.25*s, mask=(kv - q - Skv + Sq <= 0)", (1, 4, 1, 1, 50, 16, 16)),
    Case("one key", "score=0.25*s", (1, 2, 1, 5, 1, 16, 16)),
    Case("head dim 96", "score=0.25*s", (1, 1, 1, 9, 20, 96, 192), BF16),
    Case("only k", f"score=0.25*s, mask={CAUSAL}", needs=(False, True, False)),
    Case("only q", f"score=0.25*s, mask={CAUSAL}", needs=(True, False, False)),
    Case("documents, lists", f"score=0.25*s, mask=(load(0, b, q) == load(0, b, kv)) & {CAUSAL}", (2, 2, 1, 50, 50, 16, 16), aux=("documents",), lists=True),
    Case("documents, lists, wide queries, bias", "score=0.25*s + load(1, b, h, q, kv), mask=(load(0, b, q) == load(0, b, kv))", (1, 2, 1, 37, 37, 16, 16), aux=("documents", "bias"), block=(32, 16), lists=True),
    Case("key mask, lists, dropout", f"score=0.25*s, mask=load(1, b, 0, 0, kv) != 0, dead=zero, weight={DROP}", (2, 2, 1, 9, 37, 16, 16), aux=("seed", "padding"), lists=True),
    Case("dense mask by head, fill with s, lists", f"score=0.25*s, mask=(load(0, h, q, kv) != 0) & {CAUSAL}, dead=score, fill=0.25*s - 9.0", (1, 2, 1, 40, 30, 16, 16), aux=("dense_by_head",), lists=True),
    Case("dropout", f"score=0.25*s, weight={DROP}", TWO, aux=("seed",), dlse=True),
    Case("dropout, causal, bf16", f"score=0.25*s, mask={CAUSAL}, weight={DROP}", (1, 2, 1, 48, 48, 16, 16), BF16, aux=("seed",)),
    Case("dropout, window, zero", f"score=0.25*s, mask={WINDOW}, dead=zero, weight={DROP}", LONG, aux=("seed",)),
    Case("dropout, window, nan", f"score=0.25*s, mask={WINDOW}, weight={DROP}", LONG, aux=("seed",)),
    Case("dropout, softcap, a sink", f"score=5.0*tanh(0.05*s), mask={CAUSAL}, sinks=[load(1, 0, h, 0, 0)], weight={DROP}", aux=("seed", "slopes")),
    Case("dropout, dense bias", f"score=0.25*s + load(1, b, h, q, kv), weight={DROP}", aux=("seed", "bias")),
    Case("mask after the softmax", "score=0.25*s, weight=where(load(0, 0, 0, q, kv) != 0, 1, 0)", aux=("dense",)),
    Case("gates after the softmax", f"score=0.25*s, mask={CAUSAL}, weight=load(0, b, h, q, kv)*load(1, b, q) + load(2, h)", TWO, aux=("bias", "rows", "heads")),
    Case("gate by key", f"score=0.25*s, mask={CAUSAL}, weight=load(0, b, kv)*{DROP.replace('load(0', 'load(1')}", TWO, aux=("keys", "seed")),
    Case("table", f"score=0.25*s + load(0, h, {BUCKET}), mask={CAUSAL}", TWO, aux=("relative",)),
    Case("table, split, bf16", f"score=0.25*s + load(0, h, {BUCKET})", (3, 2, 1, 21, 37, 16, 16), BF16, aux=("relative",), enough=99),
    Case("table, in chunks", f"score=0.25*s + load(0, h, {BUCKET})", TWO, aux=("relative",), scratch=16 * 4 * 53),
    Case("by distance, wide queries, window, bf16", f"score=0.25*s + load(0, h, kv - q + 39), mask={WINDOW}", (2, 4, 2, 40, 70, 16, 16), BF16, ("distances",), block=(32, 16)),
    Case("by distance, wide keys, window, more queries", f"score=0.25*s + load(0, h, kv - q + 69), mask={WINDOW}, dead=zero", (1, 2, 1, 70, 23, 16, 16), aux=("distances",), dlse=True, block=(16, 32)),
    Case("by distance, in chunks", "score=0.25*s + load(0, h, q - kv + 36)", (2, 2, 1, 50, 37, 16, 16), aux=("distances",), scratch=4),
    Case("by distance alone, documents, dropout, a sink, split", f"score=0.25*s + load(0, kv - q + 49), mask=(load(1, b, q) == load(1, b, kv)) & {CAUSAL}, sinks=[0.0], weight={DROP.replace('load(0', 'load(2')}", (2, 2, 1, 50, 50, 16, 16), aux=("distances of all", "documents", "seed"), enough=99),
    Case("by distance, a fill of it, all dead", f"score=0.25*s + load(0, h, kv - q + 39), mask={WINDOW}, dead=score, fill=load(0, h, kv - q + 39) - 99.0", LONG, aux=("distances",), block=(32, 16)),
    Case("table of T5", f"score=0.25*s + load(0, {BUCKET}, h)*load(1, h)", TWO, aux=("turned_relative", "heads")),
    Case("table of Swin", "score=0.25*s + load(0, load(1, q, kv), h)", (3, 2, 2, 16, 16, 16, 16), aux=("turned_relative", "index"), enough=99),
    Case("table of Swin, in chunks", "score=0.25*s + load(0, load(1, q, kv), h)", (2, 2, 2, 33, 30, 16, 16), aux=("turned_relative", "index"), scratch=16 * 4 * 30),
    Case("decomposed", "score=0.25*s + load(0, b, h, q, floordiv(kv, 8)) + load(1, b, h, q, mod(kv, 8))", TWO, aux=("decomposed", "decomposed")),
    Case("decomposed, in chunks", "score=0.25*s + load(0, b, h, q, floordiv(kv, 8))", TWO, aux=("decomposed",), scratch=16 * 4 * 37),
    Case("decomposed over heads", "score=0.25*s + load(0, b, 0, q, floordiv(kv, 8))", TWO, aux=("decomposed",)),
    Case("a dense bias read twice", "score=0.25*s + load(0, 0, h, q, kv) + 0.5*load(0, 0, h, kv, q)", (2, 2, 1, 21, 21, 16, 16), aux=("head_bias",)),
    Case("read by row, key and both", "score=0.25*s + load(0, q) + 2*load(0, kv) + load(0, mod(kv - q, 9))", TWO, aux=("positions",)),
    Case("dense bias over both, split", "score=(0.25*s + load(0, q, kv))*0.5", (3, 2, 1, 21, 37, 16, 16), aux=("plain_bias",), enough=99),
    Case("number added beside a sink, sharp, bf16", "score=load(0, h) + 0.25*s, sinks=[0.0]", aux=("heads",), dtype=BF16, sharp=True),
    Case("numbers by row, sharp, fp16, dLSE", f"score=load(0, b, q) + 0.25*s + load(1)*pow(s, 2), mask={CAUSAL}, sinks=[{SLOPES.replace('0', '2', 1)}]", TWO, F16, ("rows", "scalar", "slopes"), dlse=True, sharp=True),
    Case("temperature, dropout, sharp, bf16, frozen", f"score=s*load(0, h), weight={DROP.replace('load(0', 'load(1')}", TWO, BF16, ("heads", "seed"), needs=(False, False, False, True, False), sharp=True),
    Case("table, sharp, bf16, frozen", "score=0.25*s + load(0, h, max(min(kv - q, 1), -1) + 7), sinks=[1.0]", TWO, BF16, ("relative",), needs=(False, False, False, True), sharp=True),
    Case("table, fill of a table, sharp, bf16", f"score=0.25*s + load(0, h, {BUCKET}), mask={WINDOW}, dead=score, fill=s + load(0, h, {BUCKET})", LONG, BF16, ("relative",), sharp=True),
    Case("fill by key", f"score=0.25*s, mask={WINDOW}, dead=score, fill=-kv*0.5", LONG, BF16),
    Case("fill with s", f"score=0.25*s, mask={WINDOW}, dead=score, fill=0.25*s - 99.0", LONG, dlse=True),
    Case("fill, slope of its own", f"score=5.0*tanh(0.05*s), mask={WINDOW}, dead=score, fill=tanh(s)*load(0, h) + load(1, b, kv)", LONG, aux=("heads", "keys")),
    Case("fill, group 2, wide keys", f"score=0.25*s, mask={WINDOW}, dead=score, fill=s", (1, 4, 2, 50, 33, 16, 16), block=(16, 32)),
    Case("fill, wide queries", f"score=0.25*s + load(0, b, q), mask={WINDOW}, dead=score, fill=0.5*s + load(0, b, q)", (1, 2, 1, 50, 33, 16, 16), aux=("rows",), block=(32, 16)),
    Case("fill of a dense bias", f"score=0.25*s + load(0, b, h, q, kv), mask={WINDOW}, dead=score, fill=0.25*s + load(0, b, h, q, kv) - 50.0", LONG, aux=("bias",)),
    Case("fill of a table", f"score=0.25*s + load(0, h, {BUCKET}), mask={WINDOW}, dead=score, fill=load(0, h, {BUCKET})", LONG, aux=("relative",)),
    Case("fill and a sink", f"score=0.25*s, mask={WINDOW}, dead=score, fill=-2.0, sinks=[{SLOPES}]", LONG, aux=("slopes",)),
    Case("least fill and dropout", f"score=0.25*s, mask={WINDOW}, dead=score, fill=0.25*s + {MIN}, weight={DROP}", LONG, aux=("seed",)),
    Case("least fill and dropout, no mask left", f"score=0.25*s, mask=load(1, b, 0, 0, kv) != 0, dead=score, fill={MIN}, weight={DROP}", (2, 2, 1, 9, 37, 16, 16), aux=("seed", "nothing")),
    Case("constant score, fill with s", f"score=1.0, mask={WINDOW}, dead=score, fill=0.25*s", LONG),
    Case("score without s", "score=load(0, b, kv)", aux=("keys",)),
    Case("sigmoid", "normalize=none, score=sigmoid(0.25*s - 2.0)", TWO),
    Case("sigmoid, even", f"normalize=none, score=sigmoid(0.25*s - 2.0), mask={CAUSAL}", (1, 2, 2, 32, 32, 16, 16)),
    Case("sigmoid, bf16, causal, dense bias", f"normalize=none, score=sigmoid(0.25*s + load(0, b, h, q, kv)), mask={CAUSAL}", (2, 4, 2, 37, 37, 16, 16), BF16, aux=("bias",)),
    Case("sigmoid, table, slopes by row and key", f"normalize=none, score=sigmoid(s*load(2, b, q) + load(0, h, {BUCKET}))*load(1, b, kv), mask={WINDOW}", TWO, aux=("relative", "keys", "rows")),
    Case("relu squared, no key", f"normalize=none, score=pow(max(0.25*s, 0), 2), mask={WINDOW}", LONG),
    Case("silu, fp16, dk != dv", "normalize=none, score=0.01*s*sigmoid(0.25*s)", (2, 2, 2, 20, 33, 40, 24), F16),
    Case("decay", f"normalize=none, score=s*exp(abs(load(0, 0, h, 0, 0))*(kv - q)), mask={CAUSAL}", (2, 2, 1, 37, 37, 16, 16), aux=("slopes",)),
    Case("overflow behind the mask", f"normalize=none, score=s*exp(9.0*(kv - q)*load(0, 0, h, 0, 0)), mask={CAUSAL}", (1, 2, 1, 37, 37, 16, 16), aux=("slopes",), block=(16, 32)),
    Case("linear, padding, dropout", f"normalize=none, score={DROP}*s, mask=load(1, b, 0, 0, kv) != 0", (2, 2, 1, 9, 37, 16, 16), aux=("seed", "padding")),
    Case("sigmoid, documents, lists, bias", "normalize=none, score=sigmoid(0.25*s + load(1, b, h, q, kv)), mask=(load(0, b, q) == load(0, b, kv))", (1, 2, 1, 37, 37, 16, 16), aux=("documents", "bias"), block=(32, 16), lists=True),
    Case("sigmoid, only q", "normalize=none, score=sigmoid(0.25*s)", needs=(True, False, False)),
    Case("weight without s", "normalize=none, score=load(0, b, kv)", aux=("keys",)),
    Case("relu and its sums", f"normalize=sums, score=max(0.25*s + load(0, b, h, q, kv), 0)*load(1, b, kv), mask={CAUSAL}", TWO, aux=("bias", "keys"), dlse=True),
    Case("sums that have no gradient", "normalize=sums, score=sigmoid(0.25*s)", (1, 4, 2, 37, 50, 16, 16), block=(32, 16)),
    Case("two masks, added", f"score=0.25*s + {ADDED}", TWO, aux=("seen", "seen too"), needs=(True, True, True, False, False)),
    Case("temperatures out of range", f"score=s*exp(load(0, h)), mask={CAUSAL}", (1, 4, 2, 21, 37, 16, 16), aux=("temperatures",)),
    Case("a scale below float32's", f"score=1e-46*s, mask={CAUSAL}"),
]  # fmt: skip


# One of each kind; CI has no time for the others.
IN_CI = {
    "full",
    "weights sum to one",
    "fp16, dk != dv",
    "bf16, causal",
    "window, zero",
    "least fill, one tile",
    "fill by key",
    "fill with s",
    "no key, least fill",
    "key mask, zero",
    "documents, lists",
    "softcap",
    "alibi",
    "row and key bias",
    "dense bias",
    "dense bias over the batch",
    "two masks, added",
    "table",
    "table of Swin",
    "decomposed",
    "number added beside a sink, sharp, bf16",
    "table, sharp, bf16, frozen",
    "sink",
    "dropout",
    "gates after the softmax",
    "sigmoid, even",
    "decay",
    "relu and its sums",
    "one query",
    "only k",
}


def test_what_ci_runs_is_there() -> None:
    assert {case.name for case in CASES} >= IN_CI


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> Iterator[Interpreter]:
    pytest.importorskip("triton")
    with interpreter(__name__, tmp_path_factory.mktemp("interpreter")) as run_case:
        yield run_case


@pytest.mark.parametrize(
    "case",
    [pytest.param(x, marks=[] if x.name in IN_CI else pytest.mark.slow) for x in CASES],
    ids=lambda x: x.name,
)
def test_matches_float64(case: Case, interpreted: Interpreter) -> None:
    record = interpreted(case.name)
    assert record["supported"] is None
    for name, x in record["gradients"].items():
        assert x["same_nan"], (name, x)
        assert x["error"] <= 2 * x["error_of_reference"] + x["floor"], (name, x)
        assert x["layout"], (name, x)
    if case.ones:
        # The rounding of an LSE of 900 alone would be 3e-5.
        assert record["error_of_sums"] < 2e-6


def run(case: Case) -> dict:
    from fa3_compile.lower.choose import Problem
    from fa3_compile.lower.kernels import triton_backward as ours
    from fa3_compile.lower.kernels import triton_captured, triton_diagonals
    from fa3_compile.lower.kernels.reference import attention, attention_backward
    from fa3_compile.lower.render import render_blocks
    from fa3_compile.lower.tiles.config import TritonConfig
    from fa3_compile.lower.tiles.tune_backward import Configs
    from fa3_compile.runtime.op import BackwardInputs

    render_blocks.WORTHWHILE = 0 if case.lists else 2**20
    triton_captured.SCRATCH, triton_captured.ENOUGH_PROGRAMS = case.scratch, case.enough
    triton_diagonals.ENOUGH_BANDS = case.enough
    torch.manual_seed(0)
    spec = parsed(case.spec, case.aux)
    batch, heads, kv_heads, q_len, kv_len, dim, v_dim = case.shape
    q = torch.randn(batch, q_len, heads, dim).to(case.dtype).transpose(1, 2)
    k = torch.randn(batch, kv_heads, kv_len, dim).to(case.dtype)
    v = (torch.randn(batch, kv_heads, kv_len, v_dim) + case.values).to(case.dtype)
    if "hidden" in case.name:
        v[:, :, 6:] = 1e6
    dout = torch.randn(batch, heads, q_len, v_dim).to(case.dtype)
    if case.sharp:
        q *= 8
    if case.ones:
        dout.fill_(1.0)
    dlse = torch.randn(batch, heads, q_len) if case.dlse else None
    aux = [captured(x, case.shape) for x in case.aux]
    needs = [*case.needs, *(x.is_floating_point() for x in aux)][: 3 + len(aux)]
    if len(case.needs) > 3:
        needs = list(case.needs)
    dtypes = tuple(x.dtype for x in aux)
    problem = Problem(spec, case.dtype, q.device, None, *case.shape, aux_dtypes=dtypes)
    problem = replace(problem, needs_grad=True, aux_needs_grad=tuple(needs[3:]))
    supported = ours.supports_backward(problem)
    if supported is not None:
        return {"name": case.name, "supported": supported}
    out, lse = attention(spec, q, k, v, aux, case.sizes)
    config = TritonConfig(*case.block, num_warps=4, num_stages=1)
    given = BackwardInputs(dout, dlse, q, k, v, out, lse, aux, case.sizes, needs)
    if case.values:
        found = ours.run_backward(problem, given)
    else:
        found = ours.compute(problem, ours.bind(problem, Configs(config, config), given), given)
    exact = attention_backward(
        spec, dout.double(), dlse, q.double(), k.double(), v.double(),
        [x.double() if x.is_floating_point() else x for x in aux], case.sizes, needs,
    )  # fmt: skip
    rounded = attention_backward(spec, dout, dlse, q, k, v, aux, case.sizes, needs)
    names = ("dq", "dk", "dv", *(f"aux{i}" for i in range(len(aux))))
    inputs = (q, k, v, *aux)
    columns = [(*x[:3], *x[3]) for x in (found, exact, rounded)]
    gradients = {}
    for name, like, x, y, z in zip(names, inputs, *columns):
        assert (x is None) == (y is None), name
        if x is None:
            continue
        eps = torch.finfo(x.dtype if case.sharp else case.dtype).eps
        gradients[name] = {
            "same_nan": torch.equal(x.isnan(), y.isnan()),
            "error": distance(x, y),
            "error_of_reference": distance(z, y),
            "floor": 8 * eps * ((not case.values) / 2 + y.nan_to_num(0.0).abs().max().item()),
            "layout": x.stride() == torch.empty_like(like).stride() and x.dtype == like.dtype,
        }
    record = {"name": case.name, "supported": None, "gradients": gradients}
    if case.ones:
        ours, exact = (torch.as_tensor(column[2]).double().sum(2) for column in columns[:2])
        record["error_of_sums"] = ((ours - exact) / exact).abs().max().item()
    return record


if __name__ == "__main__":
    serve(CASES, run)
