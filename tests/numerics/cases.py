"""Attentions for the operator's tests, and dense float64 attention whose scores numpy computes from
their text."""

from dataclasses import dataclass

import numpy as np
import torch

from fa3_compile.runtime.op import split_text
from tests.spec.by_hand import evaluate

LOWEST = "-3.4028234663852886e+38"


@dataclass
class Case:
    """One attention; `aux` are the shapes of captured tensors, by the letters of their axes."""

    fields: str
    aux: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    shape: tuple[int, ...] = (2, 4, 2, 19, 23)  # B, H, Hkv, Sq, Skv
    dims: tuple[int, int] = (8, 8)
    sizes: tuple[int, ...] = ()
    cpu: bool = True
    grads: bool = True

    def text(self, kernels="reference"):
        aux = f", aux=[{', '.join(self.kinds)}]" if self.kinds else ""
        return f"attention({self.fields}{aux}) #;kernels={kernels}"

    def tensors(self, dtype=torch.float32, requires_grad=False):
        """(q, k, v, aux), the same in every call; q, k, v as views of [B, S, H, D]."""
        generator = torch.Generator().manual_seed(0)
        b, h, hkv, sq, skv = self.shape
        d, dv = self.dims

        def normal(batch, heads, length, dim):
            x = torch.randn(batch, length, heads, dim, generator=generator, dtype=torch.float64)
            return x.to(dtype).transpose(1, 2).requires_grad_(requires_grad)

        q, k, v = normal(b, h, sq, d), normal(b, hkv, skv, d), normal(b, hkv, skv, dv)
        length = {"b": b, "h": h, "q": sq, "k": skv, "1": 1, "7": 7, "t": 64}
        aux = []
        for axes, kind in zip(self.aux, self.kinds):
            x = torch.rand([length[a] for a in axes], generator=generator, dtype=torch.float64)
            if kind == "float":
                aux.append(x.to(dtype).requires_grad_(requires_grad))
            else:
                aux.append(x > 0.4 if kind == "bool" else (x * 3).long())
        return q, k, v, aux


CASES = {
    "plain": Case("score=0.3*s"),
    "no-scale": Case("score=s"),
    "causal": Case("score=0.3*s, mask=kv <= q, dead=nan"),
    "causal-bottom-right": Case(
        "score=0.3*s, mask=kv <= q + Skv - Sq, dead=nan", shape=(1, 2, 1, 7, 23)
    ),
    "window": Case("score=0.3*s, mask=(kv <= q) & (q - kv < 5), dead=nan"),
    "window-of-size": Case("score=0.3*s, mask=(kv <= q) & (q - kv < n1), dead=nan", sizes=(1, 6)),
    "softcap": Case("score=5*tanh(0.2*s), mask=kv <= q, dead=nan", cpu=False),
    "alibi": Case(
        "score=0.3*s + load(0, h)*(kv - q), mask=kv <= q, dead=nan", aux=("h",), kinds=("float",)
    ),
    "alibi-closed": Case("score=0.3*s + pow(2, -0.5*h - 0.5)*(kv - q)"),
    "bias": Case("score=0.3*s + load(0, 0, h, q, kv)", aux=("1hqk",), kinds=("float",)),
    "bias-of-half-precision-order": Case(
        "score=0.3*s + load(0, q, kv, h)", aux=("qkh",), kinds=("float",)
    ),
    "relative-bias": Case(
        "score=s + load(0, mod(kv - q, 11) + 5, h)", aux=("th",), kinds=("float",)
    ),
    "guarded-load": Case(
        "score=s + where(kv < 7, load(0, b, kv), load(1, b, kv))",
        aux=("b7", "b1"),
        kinds=("float", "float"),
    ),
    "padding": Case(
        "score=0.3*s, mask=load(0, b, kv) != 0, dead=nan", aux=("bk",), kinds=("bool",)
    ),
    "documents": Case(
        "score=0.3*s, mask=(load(0, b, q) == load(1, b, kv)) & (kv <= q + 9), dead=zero",
        aux=("bq", "bk"),
        kinds=("int", "int"),
    ),
    "gqa-8": Case("score=0.3*s, mask=kv <= q, dead=nan", shape=(1, 8, 1, 5, 9)),
    "sinks": Case(
        "score=0.3*s, mask=q - kv > 3, dead=nan, sinks=[load(0, h), 0.5]",
        aux=("h",),
        kinds=("float",),
        cpu=False,
    ),
    "dead-nan": Case("score=0.3*s, mask=kv > q + 9, dead=nan", grads=False),
    "dead-zero": Case("score=0.3*s, mask=kv > q + 9, dead=zero"),
    "dead-uniform": Case(f"score=0.3*s, mask=kv > q + 9, dead=score, fill={LOWEST}"),
    "dead-absorbed": Case(
        "score=0.3*s, mask=kv > q + 9, dead=score, fill=0.3*s - 3e+38", grads=False
    ),
    "dead-additive": Case("score=0.3*s, mask=kv > q + 9, dead=score, fill=0.3*s - 100"),
    "dead-of-scores": Case("score=0.3*s, mask=kv > q + 9, dead=score, fill=tanh(s)", cpu=False),
    "v-narrower": Case("score=0.3*s, mask=kv <= q, dead=nan", dims=(12, 5)),
    "v-wider": Case("score=0.3*s", dims=(4, 20)),
    "order": Case("score=0.3*s, out_order=bqhd"),
    "one-query": Case("score=0.3*s, mask=kv <= q + Skv - Sq, dead=nan", shape=(3, 4, 4, 1, 17)),
    "by-head-and-row": Case("score=0.1*h*s + 0.2*q - 0.1*b*kv", cpu=False),
    "steps-of-scores": Case("score=0.3*s + where(s > 0.5, 1, 0)", cpu=False),
    "steps-by-key": Case("score=0.3*s + where(kv > 5, 1, 0)"),
    "constant": Case("score=2.0, mask=kv <= q, dead=nan", cpu=False, grads=False),
    "nothing": Case("score=s, mask=False, dead=zero"),
    "sigmoid": Case(
        "normalize=none, score=sigmoid(0.3*s - load(0, h)), mask=kv <= q + 3",
        aux=("h",),
        kinds=("float",),
        cpu=False,
    ),
    "squares-and-sums": Case(
        "normalize=sums, score=pow(0.3*s, 2)*load(0, b, kv), mask=q - kv > 3, out_order=bqhd",
        aux=("bk",),
        kinds=("float",),
        cpu=False,
    ),
}


def dense(case):
    """(out, lse) in float64, by numpy, from the definition in AttentionSpec's docstring."""
    spec, _ = split_text(case.text())
    q, k, v, aux = case.tensors()
    q, k, v = (x.numpy().astype(np.float64) for x in (q, k, v))
    b, h, hkv, sq, skv = case.shape
    k, v = (np.repeat(x, h // hkv, axis=1) for x in (k, v))
    at = dict(zip("bhq", np.ix_(range(b), range(h), range(sq))))
    at = {name: x[..., None] for name, x in at.items()}
    at |= {"kv": np.arange(skv), "s": q @ k.swapaxes(-1, -2), "Sq": sq, "Skv": skv}
    at |= {f"n{i}": n for i, n in enumerate(case.sizes)}

    class Clamped:
        def __init__(self, x):
            self.x = x.numpy()

        def __getitem__(self, index):
            return self.x[tuple(np.clip(i, 0, n - 1) for i, n in zip(index, self.x.shape))]

    loads = [Clamped(x) for x in aux]
    shape = (b, h, sq, skv)
    score = np.broadcast_to(evaluate(spec.score, loads, **at), shape)
    mask = np.broadcast_to(evaluate(spec.mask, loads, **at), shape)
    if not spec.normalized:
        p = np.where(mask, score, 0.0)
        return p @ v, p.sum(-1) * spec.sums
    dead = ~mask.any(-1, keepdims=True)
    x = np.where(mask, score, -np.inf)
    if spec.fill is not None:
        fill = evaluate(spec.fill, loads, **at).astype(np.float32)  # absorbs s, as in float32
        x = np.where(dead, fill, x)
    sinks = [np.broadcast_to(evaluate(e, loads, **at), (b, h, sq, 1)) for e in spec.sinks]
    logits = np.concatenate([x, *sinks], -1)
    with np.errstate(all="ignore"):
        top = logits.max(-1, keepdims=True)
        weight = np.exp(logits - np.where(np.isinf(top), 0, top))
        total = weight.sum(-1, keepdims=True)
        p = (weight / total)[..., :skv]
        lse = (np.log(total) + top)[..., 0]
    if spec.dead == "zero":
        p = np.where(total == 0, 0, p)
    return p @ v, lse
