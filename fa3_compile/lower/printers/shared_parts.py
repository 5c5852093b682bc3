"""Which parts of expressions are printed once and named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import sympy


def shared_parts(exprs: Sequence[sympy.Basic]) -> list[sympy.Basic]:
    """Subexpressions worth a variable, innermost first."""
    count: Counter[sympy.Basic] = Counter()
    order: list[sympy.Basic] = []

    def visit(node) -> None:
        if not node.args or node.is_number:
            return
        count[node] += 1
        if count[node] == 1:
            for child in node.args:
                visit(child)
            order.append(node)

    for expr in exprs:
        visit(expr)
    return [x for x in order if count[x] > 1]
