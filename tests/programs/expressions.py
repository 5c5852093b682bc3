"""Random expressions of positions, of tensors that are given and of scores, as masks and scores of
random attention programs: integers of every width, booleans, floats and their casts.

A rule's text has parts of other kinds in braces, and is Python when these are written out.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.programs.masks import BATCH, HEADS, positions

# s is the scores; q, kv, h and b are positions; the other names are those of `GIVEN`.
LEAVES = {
    "int": "q q q kv kv kv h b row_ids key_ids batch_ids pair_ids bytes small short int32".split(),
    "bool": ["(kv <= q)", "(q - kv < 4)", "row_mask", "key_mask", "batch_mask", "pair_mask"],
    "float": "row key pair head batch half_row half_key q.float() kv.float() ((kv-q)/4)".split(),
    "score": ["s"],
    "bounded": ["key", "row", "pair", "head", "batch", "half_row", "half_key"],
}
ENDS = {
    "op": ("<", "<=", ">", ">=", "==", "!="),
    "some": ("-3", "-2", "-1", "0", "1", "2", "3", "5", "9"),
    "divisor": ("2", "3", "4", "5", "-3"),
    "bits": ("0", "1", "2", "3"),
    "level": ("0", "0.3", "0.5", "-1.0", "2"),
    "factor": ("0.5", "0.1", "-0.25", "3.0", "-2"),
    "integers": ("int64", "int32", "int16", "int8", "uint8"),
    "floats": ("float16", "bfloat16", "float32", "float64"),
    "logic": ("&", "|", "^", "*", "+", "==", "!=", "<", "<="),
    "extreme": ("minimum", "maximum"),
    "mode": ("floor", "trunc"),
    "step": ("floor", "ceil", "round", "trunc"),
    "smooth": ("tanh", "sigmoid", "sin", "cos"),
    "activation": tuple(
        """gelu silu softplus elu celu selu leaky_relu relu relu6 hardtanh hardswish logsigmoid mish
        softsign tanhshrink hardshrink softshrink""".split()
    ),
}
RULES: dict[str, tuple[str, ...]] = {
    "int": (
        "({int} + {int})", "({int} - {int})", "({int} * {int})", "({int} * {some})",
        "({int} + {some})", "({some} - {int})", "({int} // {divisor})", "({int} % {divisor})",
        "torch.div({int}, {divisor}, rounding_mode='{mode}')", "torch.fmod({int}, {divisor})",
        "{int}.abs()", "(-{int})", "torch.{extreme}({int}, {int})", "{int}.clamp(0, {some})",
        "{int}.clamp(min={some})", "torch.where({bool}, {int}, {int})",
        "torch.where({bool}, {int}, {some})", "{int}.masked_fill({bool}, {some})",
        "{bool}.to(torch.{integers})", "({int} & {int})", "({int} | {some})", "({int} ^ {int})",
        "({int} >> {bits})", "({int} << {bits})", "(~{int})", "{int}.to(torch.{integers})",
        "torch.sign({int})", "{int}.square()", "{float}.{step}().clamp(-99, 99).long()",
        "{float}.clamp(-99, 99).int()", "table[{int}.long().clamp(0, 9)]",
        "table[{int}.long() % 10]", "table[{int}.long() % 10 - 10]",
    ),
    "bool": (
        "({int} {op} {int})", "({int} {op} {int})", "({int} {op} {some})", "({int} {op} {some})",
        "({float} {op} {float})", "({float} {op} {level})", "({bool} {logic} {bool})",
        "({bool} {logic} {bool})", "(~{bool})", "torch.logical_and({bool}, {int})",
        "torch.logical_or({int}, {bool})", "torch.logical_xor({bool}, {int})",
        "torch.logical_not({int})", "{int}.bool()", "{float}.bool()",
        "torch.where({bool}, {bool}, {bool})", "{bool}.masked_fill(key_mask, False)",
        "torch.isin({int}, table)",
    ),
    "float": (
        "{int}.float()", "{int}.double()", "({int} % 61).half()", "({int} / {divisor})",
        "({int} / 41)", "({int} * {factor})", "({float} + {float})", "({float} - {float})",
        "({float} * {float})", "({float} / 0.3)", "({bool} * {factor})",
        "torch.where({bool}, {float}, {level})", "torch.where({bool}, {float}, {float})",
        "torch.{smooth}({float})", "{float}.abs().sqrt()", "{float}.{step}()", "{float}.frac()",
        "torch.{extreme}({float}, {float})", "{float}.clamp(-0.5, 2.5)", "({float} % 0.5)",
        "({float}.detach() // 0.5)", "torch.exp(-{float}.abs())", "{float}.clamp(-99, 99).to(torch.{floats})",
        "vector[{int}.long() % 7]",
    ),
    "bounded": (
        "{float}.clamp(-4, 4)", "torch.{smooth}({float})", "({int} % 7)", "({bool} * {factor})",
        "torch.where({bool}, {bounded}, {level})", "-{float}.abs().clamp(max=5)",
        "vector[{int}.long() % 7]",
    ),
    "score": (
        "({score} + {bounded})", "({score} - 0.1 * {bounded})", "({score} * {float}.clamp(-2, 2))",
        "({score} * {bool})", "({score} * {factor})", "torch.where({bool}, {score}, {score})",
        "torch.where({bool}, {score}, {bounded})", "torch.where({score} > {level}, {score}, {factor})",
        "torch.where({score} > {bounded}, {score}, 0.1 * {score})", "torch.{smooth}({score})",
        "F.{activation}({score})", "torch.{extreme}({score}, {bounded})", "{score}.clamp(-0.5, 2.5)",
        "({score} - {score})", "({score} + 0.3 * {score})", "{score}.masked_fill({bool}, {level})",
        "(torch.sign({score}) * {score}.abs().clamp(min=1e-3).sqrt())", "(3 * torch.tanh({score} / 3))",
    ),
}  # fmt: skip
LEAVES |= {name: list(values) for name, values in ENDS.items()}


@dataclass(frozen=True)
class Expression:
    """What a program does to its scores, with the tensors that it is given for it.

    number  that it was made from
    text    the mask, True where a key is seen, or "" for none; and the scores
    """

    number: int
    text: tuple[str, str]
    given: tuple[Tensor, ...]
    seen: Callable[..., Tensor] | None
    scores: Callable[..., Tensor]

    def __call__(self, s: Tensor, fill: Callable[..., Tensor], *given: Tensor) -> Tensor:
        """The scores, filled where the mask hides a key: `fill(scores, seen)`."""
        at = (*positions(s), *_heads_and_batch(s), *given)
        scores = self.scores(s, *at).to(s.dtype)
        return scores if self.seen is None else fill(scores, self.seen(s, *at))

    def of_lengths(self, n: int, m: int, device: str) -> Expression:
        """The same, of tensors for so many queries and keys."""
        return expression(self.number, n, m, device)


def expression(number: int, n: int, m: int, device: str) -> Expression:
    """The expression of that number, for so many queries and keys."""
    source = random.Random(number)
    mask = _written(source, "bool", source.choice((0, 1, 2, 3, 4)))
    mask = f"({mask} | (kv == 0))" if source.random() < 0.8 else ""  # no row without a key
    scores = _written(source, "score", source.choice((0, 0, 1, 2, 3)))
    names = [x for x in _given(1, 1) if re.search(rf"\b{x}\b", f"{mask} {scores}")]
    given = _given(n, m)
    tensors = tuple(given[x].to(device) for x in names)
    tensors = tuple(x.requires_grad_(name in LEARNED) for x, name in zip(tensors, names))
    arguments = ", ".join(("s", "q", "kv", "h", "b", *names))
    made = [
        eval(f"lambda {arguments}: {x}", {"torch": torch, "F": F}) for x in (mask or "s", scores)
    ]
    return Expression(number, (mask, scores), tensors, made[0] if mask else None, made[1])


def _written(source: random.Random, kind: str, depth: int) -> str:
    rules = RULES.get(kind, ()) if depth > 0 and source.random() < 0.9 else ()
    text = source.choice(rules or LEAVES[kind])
    return re.sub(r"{(\w+)}", lambda part: _written(source, part[1], depth - 1), text)


def _heads_and_batch(s: Tensor) -> tuple[Tensor, Tensor]:
    heads, batch = torch.arange(HEADS, device=s.device), torch.arange(BATCH, device=s.device)
    return heads[:, None, None], batch[:, None, None, None]


# Whose gradients are compared.
LEARNED = ("pair", "head", "vector")


def _given(n: int, m: int) -> dict[str, Tensor]:
    """Tensors by the names that expressions have for them."""
    generator = torch.Generator().manual_seed(3)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "row_ids": integers(-3, 7, n, 1),
        "key_ids": integers(-3, 7, m),
        "batch_ids": integers(0, 6, BATCH, 1, 1, m),
        "pair_ids": integers(-4, 9, n, m),
        "bytes": integers(0, 5, m).to(torch.uint8),
        "small": integers(-128, 128, m).to(torch.int8),
        "short": integers(-300, 300, n, 1).to(torch.int16),
        "int32": integers(-9, 9, 1, m).to(torch.int32),
        "table": integers(-2, 5, 10),
        "row_mask": normal(n, 1) > -0.7,
        "key_mask": normal(m) > -0.7,
        "batch_mask": normal(BATCH, 1, 1, m) > -0.7,
        "pair_mask": normal(n, m) > -0.7,
        "row": normal(n, 1),
        "key": normal(m),
        "pair": normal(n, m),
        "head": normal(HEADS, 1, 1),
        "batch": normal(BATCH, 1, 1, m),
        "half_row": normal(n, 1).half(),
        "half_key": normal(m).bfloat16(),
        "vector": normal(7),
    }
