"""`AttentionSpec`: one attention, as frozen data with a canonical text."""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass

import sympy
from sympy.logic.boolalg import Boolean

from fa3_compile.spec.expr import Expr, S, loads_in, sizes_in
from fa3_compile.spec.text import parse_node, text

AUX_KINDS = ("bool", "int", "float")
OUT_ORDERS = ("bhqd", "bqhd", "hbqd", "hqbd", "qbhd", "qhbd")


@dataclass(frozen=True)
class AttentionSpec:
    """out[b,h,q,:] = sum_kv p[b,h,q,kv] w[b,h,q,kv] V[b, h // G, kv, :], p = softmax over kv of
    the score, w a weight that is 1 unless said otherwise. Without a softmax (sigmoid attention,
    Ramapuram et al. 2024, section 3; retention, Sun et al. 2023, equation 5) p is the score.

    Shapes: Q [B, H, Sq, D], K [B, Hkv, Skv, D], V [B, Hkv, Skv, Dv], H = G * Hkv; the raw dot
    product is `s`. Scores are in natural-log units and float32.

    normalize "softmax", or "none": p is the score where the mask holds and 0 where it does not,
              every factor is a part of the score, and there is no LSE (it is given as 0); or
              "sums": the same, with the sum of each row's p in the place of the LSE
    score     the score where the mask holds
    mask      where it does not hold, the key has weight exactly 0 in every row that has at
              least one key where it holds
    dead      what becomes of a row in which the mask holds nowhere:
              "nan" (softmax of -inf alone), "zero" (SDPA, nan_to_num; always where there is no
              softmax), or "score": the softmax of `fill`, which is the eager score of a masked
              element
    fill      the score of masked elements, only with dead="score"
    sinks     logits that join the softmax's denominator and have no value (functions of b, h, q)
    weight    w, a factor on each probability after the softmax, which neither the denominator nor
              the LSE knows of: dropout, a mask multiplied in. None stands for 1
    aux       kind of each captured tensor: "bool", "int" or "float"
    out_order memory order of the output's axes, outermost first; its shape is [B, H, Sq, Dv]
    """

    score: Expr = S
    mask: Boolean = sympy.true
    dead: str = "nan"
    fill: Expr | None = None
    sinks: tuple[Expr, ...] = ()
    aux: tuple[str, ...] = ()
    out_order: str = "bhqd"
    weight: Expr | None = None
    normalize: str = "softmax"

    def __post_init__(self) -> None:
        if self.normalize not in ("softmax", "none", "sums"):
            raise ValueError(f"normalize is 'softmax', 'none' or 'sums', got {self.normalize!r}")
        if not self.normalized:
            object.__setattr__(self, "dead", "zero")
            if self.fill is not None or self.sinks or self.weight not in (None, 1):
                raise ValueError("fill, sinks and weight go with a softmax, and only with it")
        if self.dead not in ("nan", "zero", "score"):
            raise ValueError(f"dead is 'nan', 'zero' or 'score', got {self.dead!r}")
        if (self.fill is not None) != (self.dead == "score"):
            raise ValueError("fill goes with dead='score', and only with it")
        if bad := [k for k in self.aux if k not in AUX_KINDS]:
            raise ValueError(f"aux kinds are {AUX_KINDS}, got {bad}")
        if self.out_order not in OUT_ORDERS:
            raise ValueError(f"out_order is one of {OUT_ORDERS}, got {self.out_order!r}")
        if S in self.mask.free_symbols:
            raise ValueError("the mask may not depend on s")
        if self.weight == 1:
            object.__setattr__(self, "weight", None)
        if self.weight is not None and S in self.weight.free_symbols:
            raise ValueError("the weight may not depend on s")
        if any(x.tensor >= len(self.aux) for x in loads_in(*self.expressions)):
            raise ValueError(f"a load beyond the {len(self.aux)} captured tensors")

    @property
    def expressions(self) -> tuple[Expr | Boolean, ...]:
        """Every expression of the spec: score, mask, fill if any, sinks, weight if any."""
        fill = [] if self.fill is None else [self.fill]
        weight = [] if self.weight is None else [self.weight]
        return (self.score, self.mask, *fill, *self.sinks, *weight)

    @property
    def normalized(self) -> bool:
        """Whether the weights of V are a softmax."""
        return self.normalize == "softmax"

    @property
    def sums(self) -> bool:
        """Whether the second output is the sum of each row's weights."""
        return self.normalize == "sums"

    @property
    def has_mask(self) -> bool:
        return self.mask != sympy.true

    @property
    def size_count(self) -> int:
        """How many dynamic integers n0, n1, ... the op has to be given."""
        used = sizes_in(*self.expressions)
        return int(used[-1].name[1:]) + 1 if used else 0

    def __str__(self) -> str:
        fields = [f"score={text(self.score)}"]
        if not self.normalized:
            fields.insert(0, f"normalize={self.normalize}")
        if self.has_mask:
            fields.append(f"mask={text(self.mask)}")
        if self.normalized and (self.has_mask or self.dead != "nan"):
            fields.append(f"dead={self.dead}")
        if self.fill is not None:
            fields.append(f"fill={text(self.fill)}")
        if self.sinks:
            fields.append(f"sinks=[{', '.join(map(text, self.sinks))}]")
        if self.weight is not None:
            fields.append(f"weight={text(self.weight)}")
        if self.aux:
            fields.append(f"aux=[{', '.join(self.aux)}]")
        if self.out_order != "bhqd":
            fields.append(f"out_order={self.out_order}")
        return f"attention({', '.join(fields)})"

    @staticmethod
    def parse(source: str) -> AttentionSpec:
        """The spec that `str` printed. ValueError for anything else."""
        return _parse(source)


@functools.lru_cache(maxsize=4096)
def _parse(source: str) -> AttentionSpec:
    try:
        call = ast.parse(source, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"not an attention spec: {source!r}") from error
    match call:
        case ast.Call(func=ast.Name(id="attention"), args=[], keywords=keywords):
            pass
        case _:
            raise ValueError(f"not an attention spec: {source!r}")
    fields = {}
    for keyword in keywords:
        name, value = keyword.arg, keyword.value
        if name in fields:
            raise ValueError(f"{name} stands twice in {source!r}")
        match name, value:
            case (("score" | "mask" | "fill" | "weight"), _):
                fields[name] = parse_node(value)
            case "sinks", ast.List(elts=elements):
                fields[name] = tuple(map(parse_node, elements))
            case (("dead" | "out_order" | "normalize"), ast.Name(id=word)):
                fields[name] = word
            case "aux", ast.List(elts=elements):
                fields[name] = tuple(_word(x) for x in elements)
            case _:
                raise ValueError(f"unknown field {name!r} in {source!r}")
    return AttentionSpec(**fields)


def _word(node: ast.expr) -> str:
    if not isinstance(node, ast.Name):
        raise ValueError(f"a word is needed, got {ast.unparse(node)!r}")
    return node.id
