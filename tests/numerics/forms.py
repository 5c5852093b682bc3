"""Attention forms that every kernel family has to compute, with the tensors they capture.

No pytest here: benchmarks/kernels/sm90_forward.py runs the same on machines that have none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fa3_compile.spec import expr as E
from fa3_compile.spec.attention import AttentionSpec

CAUSAL = "(kv - q <= 0)"
WINDOW = f"{CAUSAL} & (q - kv <= 70)"
NARROW = f"{CAUSAL} & (q - kv <= 9)"
MIN = "-3.4028234663852886e38"
BF16_MIN = "-3.3895313892515355e+38"
SLOPES = "load(0, 0, h, 0, 0)"
KEY = "(load(0, b, kv) != 0)"


DROPOUT = "weight=where(uniform(load(0, 0), b, h, q, kv) < 0.25, 0, 1.3333333333333333)"


@dataclass(frozen=True)
class Form:
    """A spec's fields, the names of what it captures, and how lengths relate.

    lengths  "any"; "long": more queries than keys; "square": as many
    """

    name: str
    fields: str
    aux: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    lengths: str = "any"

    def spec(self) -> AttentionSpec:
        kinds = f", aux=[{', '.join(KINDS.get(x, 'float') for x in self.aux)}]" if self.aux else ""
        return AttentionSpec.parse(f"attention({self.fields}{kinds})")


KINDS = {"documents": "int", "ids": "int", "padding": "bool", "left": "int", "nothing": "bool"}
KINDS |= {
    "dense": "bool",
    "starts": "int",
    "paragraphs": "int",
    "seed": "int",
    "position": "int",
    "positions": "int",
    "ends": "int",
}
FORMS = [
    Form("full", "score=0.1*s"),
    Form("negative scale", "score=-0.1*s"),
    Form("scale by head", "score=0.1*s*load(0, h)", ("heads",)),
    Form("scale by size", "score=pow(n0, -0.5)*s", sizes=(64,)),
    Form("causal", f"score=0.1*s, mask={CAUSAL}"),
    Form("causal, long", f"score=0.1*s, mask={CAUSAL}", lengths="long"),
    Form("bottom right", "score=0.1*s, mask=(kv - q - Skv + Sq <= 0)"),
    Form("bottom right, zero", "score=0.1*s, mask=(kv - q - Skv + Sq <= 0), dead=zero",
         lengths="long"),
    Form("window", f"score=0.1*s, mask={WINDOW}"),
    Form("window, nan", f"score=0.1*s, mask={NARROW}", lengths="long"),
    Form("window, zero", f"score=0.1*s, mask={NARROW}, dead=zero", lengths="long"),
    Form("window, -1e9", f"score=0.1*s, mask={NARROW}, dead=score, fill=-1e9", lengths="long"),
    Form("window, least", f"score=0.1*s, mask={WINDOW}, dead=score, fill={MIN}", lengths="long"),
    Form("window, added least", f"score=0.1*s, mask={NARROW}, dead=score, fill=0.1*s + {MIN}",
         lengths="long"),
    Form("window, added", f"score=0.1*s, mask={NARROW}, dead=score, fill=0.1*s - 99.0",
         lengths="long"),
    Form("fill by key", f"score=0.1*s, mask={NARROW}, dead=score, fill=-kv*0.01", lengths="long"),
    Form("all dead, zero", "score=0.1*s, mask=(kv - q >= 5000), dead=zero"),
    Form("all dead, nan", "score=0.1*s, mask=(kv - q >= 5000)"),
    Form("prefix", f"score=0.1*s, mask={CAUSAL} | (kv < 100)"),
    Form("dynamic prefix", f"score=0.1*s, mask={CAUSAL} | (kv < n0)", sizes=(77,)),
    Form("chunks", f"score=0.1*s, mask={CAUSAL} & (floordiv(q, 64) <= floordiv(kv, 64))"),
    Form("dilated", f"score=0.1*s, mask={CAUSAL} & (mod(q - kv, 3) <= 0)"),
    Form("global and window", f"score=0.1*s, mask=(kv < 16) | ({WINDOW})"),
    Form("both sides", "score=0.1*s, mask=(abs(q - kv) <= 50), dead=zero"),
    Form("not itself", "score=0.1*s, mask=(q != kv)"),
    Form("softcap", f"score=20.0*tanh(0.005*s), mask={WINDOW}"),
    Form("softcap, full", "score=20.0*tanh(0.005*s)"),
    Form("sigmoid of s", f"score=4.0*sigmoid(0.1*s), mask={CAUSAL}"),
    Form("alibi", f"score=0.1*s + {SLOPES}*(kv - q), mask={CAUSAL}", ("slopes",)),
    Form("alibi by key", f"score=0.1*s + {SLOPES}*kv, mask={CAUSAL}", ("slopes",)),
    Form("alibi, no mask", f"score=0.1*s + {SLOPES}*(kv - q)", ("slopes",)),
    Form("alibi, softcap", f"score=9.0*tanh(0.01*s) + {SLOPES}*(kv - q), mask={CAUSAL}",
         ("slopes",)),
    Form("alibi both sides", f"score=0.1*s - {SLOPES}*abs(q - kv)", ("slopes",)),
    Form("bloom", f"score=0.1*s + load(0, b, h, 0, kv), mask={CAUSAL}", ("bloom",)),
    Form("dense bias", "score=0.1*s + load(0, b, h, q, kv)", ("bias",)),
    Form("dense bias, one batch", f"score=0.1*s + load(0, 0, h, q, kv), mask={CAUSAL}",
         ("bias_of_heads",)),
    Form("dense bias, fp32", "score=0.1*s + load(0, b, h, q, kv)", ("wide_bias",)),
    Form("dense bias, transposed", "score=0.1*s + load(0, b, h, q, kv)", ("turned_bias",)),
    Form("dense bias with -inf", "score=0.1*s + load(0, b, 0, q, kv)", ("masked_bias",)),
    Form("dense bias with -inf, zero", "score=0.1*s + load(0, b, 0, q, kv), dead=zero",
         ("masked_bias",)),
    Form("bias with -inf under a mask",
         f"score=0.1*s + load(0, b, 0, q, kv), mask={NARROW}, dead=score, fill=-1e4",
         ("masked_bias",), lengths="long"),
    Form("row and key bias", "score=0.1*s + load(0, b, q) + load(1, b, kv)", ("rows", "keys")),
    Form("relative bias", "score=0.1*s + load(0, h, max(min(kv - q, 7), -7) + 7)", ("relative",)),
    Form("relative bias, a table", "score=0.1*s + load(0, b, h, kv - q + Sq - 1)", ("table",)),
    Form("relative bias, a table, causal",
         f"score=0.1*s + load(0, q - kv + Skv - 1, h), mask={CAUSAL}", ("wide_table",)),
    Form("relative bias, fills", "score=0.1*s + load(0, 0, h, kv - q + Sq - 1), mask=(q - kv <= 40)",
         ("filled_table",)),
    Form("relative bias of a curve",
         f"score=0.1*s - {SLOPES}*log(1 + abs(kv - q)) + load(1, b)", ("slopes", "batches")),
    Form("relative bias and a sink",
         "score=0.1*s + load(0, h, max(min(kv - q, 7), -7) + 7), sinks=[load(1, 0, h, 0, 0)]",
         ("relative", "slopes")),
    Form("temperature by row", "score=s*load(0, b, q)", ("rows",)),
    Form("decomposed", "score=0.1*s + load(0, b, h, q, floordiv(kv, 32))", ("decomposed",)),
    Form("key mask", "score=0.1*s, mask=load(0, b, 0, 0, kv) != 0, dead=zero", ("padding",)),
    Form("key mask, least", f"score=0.1*s, mask=load(0, b, 0, 0, kv) != 0, dead=score, fill={MIN}",
         ("padding",)),
    Form("no key, least", f"score=0.1*s, mask=load(0, b, 0, 0, kv) != 0, dead=score, fill={MIN}",
         ("nothing",)),
    Form("left padding", f"score=0.1*s, mask={KEY} & {CAUSAL}, dead=score, fill=0.1*s + {BF16_MIN}",
         ("left",), lengths="square"),
    Form("left padding, -1e4",
         f"score=0.1*s, mask={KEY} & {CAUSAL}, dead=score, fill=0.1*s - 10000.0",
         ("left",), lengths="square"),
    Form("left padding, window, softcap",
         f"score=20.0*tanh(0.005*s), mask={KEY} & {WINDOW}, dead=score,"
         f" fill=20.0*tanh(0.005*s) + {BF16_MIN}", ("left",), lengths="square"),
    Form("key not zero", f"score=0.1*s, mask=({KEY[1:-1]}) & (load(1, b, kv) > 0.0), dead=zero",
         ("left", "keys")),
    Form("row mask", "score=0.1*s, mask=load(0, b, q) > 0.0, dead=zero", ("rows",)),
    Form("documents", f"score=0.1*s, mask=(load(0, b, q) == load(0, b, kv)) & {CAUSAL}",
         ("documents",), lengths="square"),
    Form("documents, full", "score=0.1*s, mask=(load(0, b, q) == load(0, b, kv))",
         ("documents",), lengths="square"),
    Form("documents, int32", "score=0.1*s, mask=(load(0, b, q) == load(0, b, kv))",
         ("ids",), lengths="square"),
    Form("document starts", f"score=0.1*s, mask=(kv >= load(0, b, q)) & {CAUSAL}",
         ("starts",), lengths="square"),
    Form("static cache", "score=0.1*s, mask=(kv - load(0, 0) <= 0)", ("position",)),
    Form("static cache, window",
         "score=0.1*s, mask=(kv - load(0, 0) <= 0) & (load(0, 0) - kv <= 99)", ("position",)),
    Form("static cache, rows", "score=0.1*s, mask=(kv - load(0, q) <= 0)", ("positions",)),
    Form("static cache, left padding",
         f"score=0.1*s, mask=(kv - load(0, 0) <= 0) & {KEY.replace('0,', '1,', 1)}, dead=score,"
         f" fill=0.1*s + {BF16_MIN}", ("position", "left")),
    Form("sequence ends", "score=0.1*s, mask=(kv < load(0, b)), dead=zero", ("ends",)),
    Form("dense mask", "score=0.1*s, mask=load(0, 0, 0, q, kv) != 0, dead=zero", ("dense",)),
    Form("dense mask of the future", f"score=0.1*s, mask=(load(0, 0, 0, q, kv) != 0) & {CAUSAL}",
         ("dense",)),
    Form("sink", f"score=0.1*s, mask={WINDOW}, sinks=[{SLOPES}]", ("slopes",)),
    Form("sink, alibi", f"score=0.1*s + {SLOPES}*kv, mask={WINDOW}, sinks=[{SLOPES}]",
         ("slopes",)),
    Form("sink, dead rows", f"score=0.1*s, mask={NARROW}, sinks=[{SLOPES}]", ("slopes",),
         lengths="long"),
    Form("sink, filled", f"score=0.1*s, mask={NARROW}, dead=score, fill=-2.0, sinks=[{SLOPES}]",
         ("slopes",), lengths="long"),
    Form("sink of each row, filled",
         f"score=0.1*s, mask={NARROW}, dead=score, fill=-2.0, sinks=[load(0, b, q)]", ("rows",),
         lengths="long"),
    Form("two sinks, one per row", "score=0.1*s, sinks=[0.0, load(0, b, q)]", ("rows",)),
    Form("dropout", f"score=0.1*s, {DROPOUT}", ("seed",)),
    Form("dropout, causal", f"score=0.1*s, mask={CAUSAL}, {DROPOUT}", ("seed",)),
    Form("dropout, dead rows",
         f"score=0.1*s, mask={NARROW}, dead=score, fill={MIN}, {DROPOUT}", ("seed",),
         lengths="long"),
    Form("dropout of other places",
         "score=0.1*s, weight=where(uniform(load(0, 0), b, 0, q, kv + 3) < 0.25, 0, 2.0)",
         ("seed",)),
    Form("weight by key", "score=0.1*s, weight=load(0, b, kv)", ("keys",)),
    Form("weight by row and head", f"score=0.1*s, mask={CAUSAL}, weight=load(0, b, q)*load(1, h)",
         ("rows", "heads")),
    Form("weight by element", f"score=0.1*s, mask={WINDOW}, dead=zero, weight=load(0, b, h, q, kv)",
         ("bias",)),
    Form("large scores", "score=30.0*s"),
    Form("[B, S, H, D]", f"score=0.1*s, mask={CAUSAL}, out_order=bqhd"),
    Form("places inside documents", "score=0.1*s, dead=zero,"
         " mask=(q - load(0, b, q) - kv + load(0, b, kv) <= -40)", ("paragraphs",),
         lengths="square"),
]  # fmt: skip
BY_NAME = {x.name: x for x in FORMS}
# Weights without a softmax, which not every family computes.
UNNORMALISED = [
    Form("sigmoid", "normalize=none, score=sigmoid(0.1*s - 6.0)"),
    Form("sigmoid, causal", f"normalize=none, score=sigmoid(0.1*s - 6.0), mask={CAUSAL}"),
    Form("sigmoid, bias", "normalize=none, score=sigmoid(0.1*s + load(0, b, h, q, kv))", ("bias",)),
    Form("squared relu, no key", f"normalize=none, score=pow(max(0.1*s, 0), 2), mask={NARROW}",
         lengths="long"),
    Form("silu, padding", "normalize=none, score=0.001*s*sigmoid(0.1*s), mask=load(0, b, 0, 0, kv) != 0",
         ("padding",)),
    Form("decay", f"normalize=none, score=s*exp(0.1*{SLOPES}*(kv - q)), mask={CAUSAL}",
         ("slopes",)),
    Form("relu and its sums", "normalize=sums, score=max(0.1*s + load(0, b, kv), 0)", ("keys",)),
    Form("sigmoid, documents", f"normalize=none, score=sigmoid(0.1*s), mask=(load(0, b, q) == load(0, b, kv)) & {CAUSAL}",
         ("documents",), lengths="square"),
]  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Lengths of one attention."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    dim: int
    v_dim: int


def shape_for(form: Form, dim: int, v_dim: int, q_len: int, kv_len: int, group: int) -> Shape:
    """A shape that the form takes."""
    if form.lengths == "square":
        kv_len = q_len
    if form.lengths == "long":
        q_len, kv_len = max(q_len, kv_len) + 101, min(q_len, kv_len)
    return Shape(2, 4, 4 // group, q_len, kv_len, dim, v_dim)


def inputs(form: Form, shape: Shape, dtype: torch.dtype, device: str, layout: str = "bshd"):
    """(q, k, v, aux): q, k, v are views of [B, S, H, D + 8] with NaN beside them."""
    generator = torch.Generator().manual_seed(len(form.name) + shape.dim)

    def normal(heads: int, length: int, dim: int) -> Tensor:
        x = torch.randn(shape.batch, length, heads, dim, generator=generator).to(dtype)
        wide = torch.full((shape.batch, length, heads, dim + 8), float("nan"), dtype=dtype)
        wide[..., :dim] = x
        x = wide.to(device)[..., :dim].transpose(1, 2)
        return x.transpose(2, 3).contiguous().transpose(2, 3) if layout == "bhds" else x

    q = normal(shape.heads, shape.q_len, shape.dim)
    k = normal(shape.kv_heads, shape.kv_len, shape.dim)
    v = normal(shape.kv_heads, shape.kv_len, shape.v_dim)
    return q, k, v, [moved(captured(x, shape, dtype, generator), device) for x in form.aux]


def moved(x: Tensor, device: str) -> Tensor:
    """With its strides: `x.to` would drop the columns that its rows are padded with."""
    whole = x if x._base is None else x._base
    return whole.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def captured(kind: str, shape: Shape, dtype: torch.dtype, generator) -> Tensor:
    """A captured tensor by its name."""
    b, h, q, kv = shape.batch, shape.heads, shape.q_len, shape.kv_len

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    eight = -(-kv // 8) * 8
    match kind:
        case "slopes":
            return torch.exp2(-torch.arange(1.0, h + 1) * 8 / h).view(1, h, 1, 1)
        case "heads":
            return (normal(h).abs() + 0.5).double()
        case "temperatures":
            return torch.tensor([0.0, -95.0, -200.0, 80.0])
        case "bloom":
            return (normal(b, h, 1, 1) * torch.arange(kv) / kv).to(dtype)
        case "bias":
            return normal(b, h, q, eight).to(dtype)[..., :kv]
        case "bias_of_heads":
            return normal(1, h, q, eight).to(dtype)[..., :kv]
        case "wide_bias":
            return normal(b, h, q, kv)
        case "turned_bias":
            return normal(b, h, kv, q).to(dtype).transpose(2, 3)
        case "masked_bias":
            x = normal(b, 1, q, eight).to(dtype)[..., :kv]
            x[:, :, :, :20] = torch.finfo(dtype).min
            x[:, :, 3:4] = float("-inf")
            x[:, :, 7:8] = torch.finfo(dtype).min
            x[:, :, :, 25::7] = float("-inf")
            return x
        case "fills":
            x = torch.where(normal(b, 1, q, eight) > 0, 0.0, -1e9).to(dtype)[..., :kv]
            x[:, :, 3:40] = -1e9
            return x
        case "rows":
            return normal(b, q)
        case "keys":
            return normal(b, kv)
        case "relative":
            return normal(h, 15)
        case "table":
            return normal(b, h, q + kv - 1).to(dtype)
        case "wide_table":
            return normal(q + kv - 1, h)
        case "filled_table":
            distance = torch.arange(1 - q, kv)
            x = normal(1, h, q + kv - 1)
            x[:, :, distance % 7 == 3] = float("-inf")
            x[:, 1:2, distance < -9] = torch.finfo(dtype).min
            x[:, 1:2, distance > 9] = torch.finfo(torch.float32).min
            return x
        case "batches":
            return normal(b)
        case "decomposed":
            return normal(b, h, q, kv // 32 + 1).to(dtype)
        case "padding":
            ends = torch.tensor([kv, 2 * kv // 3]).view(-1, 1)
            return (torch.arange(kv) < ends).view(b, 1, 1, kv)
        case "left":
            return (torch.arange(kv) >= torch.tensor([[0], [kv // 3]])).long()
        case "seen":
            return (torch.arange(kv) < torch.tensor([[kv - 9], [0]])).float()
        case "seen too":
            return (torch.arange(kv) >= torch.tensor([[7], [kv // 2]])).float()
        case "far":
            return (torch.arange(kv) < torch.arange(q)[:, None]).float()
        case "nothing":
            return torch.zeros(b, 1, 1, kv, dtype=torch.bool)
        case "documents":
            return torch.stack([torch.arange(kv) // 130 - 1, torch.arange(kv) // 211 + 2**40])
        case "ids":
            return (torch.arange(kv) // 130).expand(b, -1).int().contiguous()
        case "starts":
            return (torch.arange(kv) // 130 * 130).expand(b, -1)
        case "paragraphs":
            return (torch.arange(kv) // 50 * 50).expand(b, -1)
        case "seed":
            return torch.tensor([2**40 + 12345])
        case "position":
            return torch.tensor([kv * 2 // 3])
        case "positions":
            return torch.arange(q) + kv // 2
        case "ends":
            return torch.tensor([2**31 - 1, kv // 3], dtype=torch.int32)
        case "dense":
            x = torch.rand(1, 1, q, kv, generator=generator) > 0.6
            x[:, :, : q // 2, : kv // 2] = True
            x[:, :, q // 2 :, kv // 2 :] = False
            return x
    raise ValueError(kind)


def compare(form: Form, out: Tensor, lse: Tensor, q, k, v, aux) -> str | None:
    """What is wrong with a kernel's result, against the reference in float64."""
    from fa3_compile.lower.kernels.reference import attention
    from fa3_compile.runtime.op import empty_out

    spec = form.spec()
    exact, exact_lse = attention(spec, q.double(), k.double(), v.double(), aux, form.sizes)
    rounded, _ = attention(spec, q, k, v, aux, form.sizes)

    def distance(x: Tensor) -> float:
        return (x.double() - exact).nan_to_num(0.0).abs().max().item()

    wrong = []
    if out.shape != exact.shape or out.stride() != empty_out(q, v, spec.out_order).stride():
        wrong.append(f"layout {tuple(out.shape)} {out.stride()}")
    if not torch.equal(out.isnan(), exact.isnan()):
        wrong.append(f"NaN: {int(out.isnan().sum())}, not {int(exact.isnan().sum())}")
    largest = exact.nan_to_num(0.0).abs().max().item()
    limit = 2 * distance(rounded) + 4 * torch.finfo(q.dtype).eps * largest
    if not distance(out) <= limit:
        wrong.append(f"error {distance(out):.2e} beyond {limit:.2e}")
    # finfo.min absorbs the logarithm of a row's length in float32, so it shows in no LSE.
    finite = torch.isfinite(exact_lse) & (exact_lse.abs() < 1e30)
    if not torch.equal(lse == float("-inf"), exact_lse.float() == float("-inf")):
        wrong.append(
            f"LSE -inf: {int((lse == float('-inf')).sum())}, not "
            f"{int((exact_lse.float() == float('-inf')).sum())}"
        )
    if finite.any():
        off = (lse.double() - exact_lse)[finite].abs()
        # tanh.approx has 11 bits, and a softcap multiplies them. Beside a dense bias Q may be rounded
        # once more, to which a row of a single key owes as much as eager to its rounded score.
        dense = any({E.Q, E.KV} <= set(x.index) for x in E.loads_in(spec.score))
        bound = max(2e-3, torch.finfo(q.dtype).eps) if dense else 2e-3
        bound = (3e-2 if "tanh" in str(spec) else bound) + 1e-5 * exact_lse[finite].abs()
        if not bool((off <= bound).all()):
            wrong.append(f"LSE off by {off.max().item():.2e}")
    return "; ".join(wrong) or None
