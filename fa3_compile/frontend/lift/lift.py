"""Lifting: what is element [index] of this node?

Each aten operator answers with a short element rule, in terms of the elements of its arguments.
A tensor that has no rule, or whose rule would be dearer than reading it, is a load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import sympy
import torch
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean
from torch import fx

from fa3_compile.errors import Decline
from fa3_compile.frontend.dynamo.mutations import overwrite
from fa3_compile.frontend.dynamo.sizes import UnknownScalar, scalar, sym
from fa3_compile.frontend.lift.captured import Captured, Seed
from fa3_compile.frontend.reasons.selected_keys import (
    ONE_HOT,
    marks_the_largest,
    selected,
    selecting_call,
)
from fa3_compile.frontend.shadow.trace import SIZES, Shadow
from fa3_compile.spec.expr import Expr, erf, load, round_half_even, sigmoid, trunc, where
from fa3_compile.spec.index import Ranges

Element = Expr | Boolean
Index = tuple[Expr, ...]
Rule = Callable[..., Element]
F = TypeVar("F", bound=Rule)

RULES: dict[object, Rule] = {}


def element_of(*targets: object) -> Callable[[F], F]:
    """Registers `rule(node, index, ctx) -> element` for aten operators."""

    def register(rule: F) -> F:
        for target in targets:
            RULES[target] = rule
        return rule

    return register


class Opaque(Exception):
    """No element rule applies here: the value has to be read from memory."""

    def __init__(self, node: fx.Node, why: str):
        super().__init__(why)
        self.node, self.why = node, why


class Cheaper(Opaque):
    """The value could be computed, and is better read from memory if it is there."""


class Overwritten(Opaque):
    """The value is in memory no more where the fused operator would read it."""

    def __init__(self, node: fx.Node, by: fx.Node):
        super().__init__(node, "it is written in place before the product with V")
        self.by = by


def shape_of(node: fx.Node) -> list[Expr]:
    """The sizes of a node's value."""
    return [sym(size) for size in node.meta["val"].shape]


def number(element: Element) -> Expr:
    """A boolean element as 0 or 1."""
    return where(element, 1, 0) if isinstance(element, Boolean) and _is_logic(element) else element


def truth(element: Element) -> Boolean:
    """A numeric element as 'is not zero'."""
    if _is_logic(element):
        return element
    if isinstance(element, where) and element.args[1].is_number and element.args[2].is_number:
        condition, a, b = element.args
        if a != 0 and b == 0:
            return condition
        if a == 0 and b != 0:
            return sympy.Not(condition)
    return sympy.Ne(element, 0)


def _is_logic(element: Element) -> bool:
    return isinstance(element, Boolean) and not isinstance(element, sympy.Symbol)


# Functions whose last bit differs from one library to another, and what makes steps of them.
ROUNDED = (sympy.exp, sympy.log, sympy.tanh, sympy.sin, sympy.cos, sympy.tan, erf, sigmoid)
STEPS = (trunc, round_half_even, sympy.floor, sympy.ceiling, Relational)
# Operators one after another that are followed: each is some calls of Python's thousand.
DEEPEST = 80
# Parts of one element's expression: selects of what has the score twice double it.
MOST_PARTS = 2000


class Lifter:
    """Answers for one region. `special` gives the elements of its skeleton: the products, the
    softmax and row statistics; what depends on those can never be a load."""

    def __init__(
        self,
        shadow: Shadow,
        ranges: Ranges,
        special: dict[fx.Node, Callable[[Index], Element]],
        *,
        wide: bool = False,
        weighs: bool = False,
        result: torch.dtype | None = None,
        loads: Sequence[Captured | Seed] = (),
        read_at: fx.Node | None = None,
    ):
        self.shadow, self.ranges, self.special = shadow, ranges, special
        # The Dynamo node in whose place loads are read: what is written before is no load.
        self.read_at = read_at
        # Scores in float32: what the program rounds to half precision stays rounded.
        self.wide = wide
        # Whether what is lifted stands after the softmax, where dropout is a factor.
        self.weighs = weighs
        # The type of what is computed: what the program rounds further than that stays rounded.
        self.result = result
        # By number, the axis along which the rows of a softmax add up to 1: one of V's keys alone.
        self.adding_up: dict[int, int] = {}
        # Products with a mask of 0 and 1, as selects: their gradient is multiplied by 0.
        self.multiplied: set[where] = set()
        # What load(i, ...) reads, in order of i.
        self.loads: list[Captured | Seed] = [*loads]
        # The Dynamo nodes of the dropouts that were lifted.
        self.dropouts: list[fx.Node] = []
        self.inside = descendants(special)
        # Whether what is better read, and held by no node, is computed after all.
        self.computes = False
        self._memo: dict[tuple[fx.Node, Index], Element] = {}
        self._depth = 0
        self._counted: dict[sympy.Basic, int] = {}

    def element(self, node: fx.Node, index: Sequence[Expr]) -> Element:
        """The element of a shadow node. `Opaque` if it is neither liftable nor loadable."""
        try:
            return self._remembered(node, index)
        except Cheaper as cheaper:
            if self.computes or self._depth:
                raise
            opaque = cheaper
        self.computes = True
        try:
            found = self._remembered(node, index)
        finally:
            self.computes = False
        if any(step.has(*ROUNDED) for step in found.atoms(*STEPS)):
            raise opaque  # the last bit of such a function would decide
        return found

    def _remembered(self, node: fx.Node, index: Sequence[Expr]) -> Element:
        key = (node, self._clean(node, index))
        if key not in self._memo:
            if self._depth == DEEPEST:
                raise Opaque(node, "it is one of too many operators one after another")
            self._depth += 1
            try:
                self._memo[key] = self._element(*key)
            finally:
                self._depth -= 1
        return self._memo[key]

    def broadcast(self, arg, index: Index) -> Expr:
        """A pointwise operand's element as a number: a tensor that broadcasts, or a scalar."""
        return number(self.operand(arg, index))

    def operand(self, arg, index: Index) -> Element:
        """As `broadcast`, with booleans kept."""
        if not isinstance(arg, fx.Node):
            return sym(arg)
        if not isinstance(arg.meta["val"], torch.Tensor):
            try:
                return scalar(arg, lambda tensor: number(self.element(tensor, ())))
            except UnknownScalar as unknown:
                raise Opaque(arg, str(unknown)) from unknown
        rank = len(arg.meta["val"].shape)
        return self.element(arg, index[len(index) - rank :])

    def load(self, node: fx.Node, index: Index) -> Element:
        """The element as a read of the Dynamo node that holds this value."""
        from fa3_compile.frontend.lift.diagonals import by_distance

        if node in self.inside:
            raise Opaque(node, "it is computed from the attention's own products")
        holders = self.shadow.dynamo_of.get(node)
        if not holders:
            raise Opaque(node, "its value is not a tensor of the program")
        source = Captured(holders[0], self.shadow.since[node, holders[0]])
        written = self.read_at and overwrite(source.source, source.since, until=self.read_at)
        if written:
            raise Overwritten(node, written)
        source, index = by_distance(source, node, index, self)
        if source not in self.loads:
            self.loads.append(source)
        value = load(self.loads.index(source), *index)
        return sympy.Ne(value, 0) if node.meta["val"].dtype == torch.bool else value

    def seed(self, dropout: fx.Node) -> Expr:
        """The load of a new seed, for one reading of a dropout: no two share their numbers."""
        holders = self.shadow.dynamo_of.get(dropout, [])
        self.dropouts += holders[:1]
        self.loads.append(Seed(holders[0] if holders else None, len(self.loads)))
        return load(len(self.loads) - 1, sympy.S.Zero)

    def _clean(self, node: fx.Node, index: Sequence[Expr]) -> Index:
        shape = node.meta["val"].shape
        if len(shape) != len(index):
            raise Opaque(node, f"rank {len(shape)} read with {len(index)} indices")
        return tuple(
            sympy.S.Zero if isinstance(size, int) and size == 1 else sympy.sympify(i)
            for i, size in zip(index, shape, strict=True)
        )

    def _element(self, node: fx.Node, index: Index) -> Element:
        if node in self.special:
            return self.special[node](index)
        from fa3_compile.frontend.lift.same_numbers import check_same_numbers

        rule = RULES.get(node.target)
        if rule is None:
            try:
                return self._without_rule(node, index)
            except Overwritten:
                raise
            except Opaque as refused:
                why = f"no rule says what an element of it is, and {refused.why}"
                raise Opaque(node, why) from None
        try:
            if self.wide and _rounds_to_half(node) and node not in self.inside:
                raise Opaque(node, "arithmetic that the program rounds to half precision")
            found = rule(node, index, self)
            if self._parts(found) > MOST_PARTS:
                raise Opaque(node, "too long an expression is made of its operands")
            check_same_numbers(node, found, self)
            return found
        except (Opaque, UnknownScalar) as error:
            opaque = error if isinstance(error, Opaque) else Opaque(node, str(error))
            try:
                return self._without_rule(node, index)
            except Opaque:
                raise opaque from None

    def _parts(self, element) -> int:
        """How many parts an expression has, each counted as often as it occurs."""
        if element not in self._counted:
            self._counted[element] = 1 + sum(map(self._parts, element.args))
        return self._counted[element]

    def _without_rule(self, node: fx.Node, index: Index) -> Element:
        """A value known while compiling, or else a read."""
        from fa3_compile.frontend.lift.fold import fold

        if node not in self.inside:
            try:
                return fold(node, index)
            except Opaque:
                pass
        return self.load(node, index)


INEXACT = frozenset("add sub rsub mul div pow exp log sqrt rsqrt reciprocal _to_copy copy".split())


def _rounds_to_half(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "").split(".")[0]
    return name in INEXACT and node.meta["val"].dtype in (torch.float16, torch.bfloat16)


def descendants(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and everything computed from their elements."""
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(user for user in node.users if user.target not in SIZES)
    return seen


def ancestors(node: fx.Node) -> Iterator[fx.Node]:
    """The node and everything whose elements it is computed from, each once, found as it is asked
    for."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in seen:
            seen.add(current)
            yield current
            stack.extend(() if current.target in SIZES else current.all_input_nodes)


def declined(opaque: Opaque, shadow: Shadow) -> Decline:
    """The decline that an element without an answer leads to."""
    holders = shadow.dynamo_of.get(opaque.node)
    at = holders[0] if holders else opaque.node
    if isinstance(opaque, Overwritten) and holders:
        return written_between(holders[0], opaque.by)
    if holders and (call := selecting_call(holders[:1])):
        return selected(call, "lift")
    if opaque.node.target is torch.ops.aten._softmax.default:
        return Decline(
            "not-pointwise",
            at,
            "Take one softmax of the scores.",
            message="the scores are made of a softmax, and so each of its whole row",
            stage="lift",
        )
    if torch.Tag.nondeterministic_seeded in getattr(opaque.node.target, "tags", ()):
        return Decline(
            "random-numbers",
            at,
            "Draw them in a call of their own: a tensor of noise, added or multiplied, is fused.",
            message="the call that makes the weights draws random numbers of its own",
            stage="lift",
        )
    if marks_the_largest(opaque.node):
        return Decline(
            "scores-selected",
            at,
            ONE_HOT,
            message="the weights are 1 for the largest score of a row, and 0 for the others",
            stage="lift",
        )
    hint = "Keep what lies between the two products to element-wise operations."
    described = _described(opaque.node)
    if described.startswith(DIVISION):
        hint = (
            "Divide weights by their own sum: e / e.sum(-1, keepdim=True). What is added to them, "
            "(e + c) / e.sum(-1, keepdim=True), weigh V by apart, or leave out."
        )
    if opaque.node.target not in RULES:
        hint += " An element-wise operator takes one rule: docs/extending/operator.md."
    return Decline(
        "not-pointwise",
        at,
        hint,
        message=f"{described}: {opaque.why}",
        stage="lift",
    )


DIVISION = "division by"
DIVISIONS = (torch.ops.aten.div.Tensor, torch.ops.aten.reciprocal.default)
ROOTS = (torch.ops.aten.sqrt.default, torch.ops.aten.rsqrt.default)


def _described(node: fx.Node) -> str:
    """An operator by name; sums that go back to the rows they are of are told from others, and
    from those of norms, whose root is taken."""
    name = str(node.target)
    if not name.startswith("aten.sum.") or ROOTS[0] in (met := _met(node)) or ROOTS[1] in met:
        return name
    if met & {*DIVISIONS}:
        return f"{DIVISION} {name}"
    keeps = len(node.args) > 2 and node.args[2] is True
    unsqueezed = any(user.target is torch.ops.aten.unsqueeze.default for user in node.users)
    return f"the sum of a row, {name}" if keeps or unsqueezed else name


def _met(node: fx.Node) -> set:
    """Which roots and divisions are near, of what is made of the node alone."""
    stack, seen, met = [node], set(), set()
    while stack and len(seen) < 16:
        current = stack.pop()
        seen.add(current)
        for user in current.users:
            divided = user.target in DIVISIONS and user.args[-1] is current
            if divided or user.target in ROOTS:
                met.add(user.target)
            elif len(user.all_input_nodes) == 1 and user not in seen:
                stack.append(user)
    return met


def written_between(source: fx.Node, by: fx.Node) -> Decline:
    """The decline where `source` is written after eager reads it and before we could."""
    return Decline(
        "mutation-between",
        by,
        "Write to a copy, or after the attention.",
        message=f"{source} is written before the product with V is taken",
        stage="check",
    )
