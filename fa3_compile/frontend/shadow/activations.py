"""Which values of a shadow come with the data, and not with the model."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from fa3_compile.frontend.dynamo.activations import activations
from fa3_compile.frontend.lift.lift import ancestors
from fa3_compile.frontend.shadow.trace import Shadow


def comes_with_data(shadow: Shadow) -> Callable[[fx.Node], bool]:
    """A test of whether a value depends on an activation; a cache that is written in the graph
    does."""
    given: set[fx.Node] | None = None

    def is_given(node: fx.Node) -> bool:
        nonlocal given
        if given is None:
            [graph] = {holder.graph for holder in shadow.aten_of}
            given = activations(graph)
        inputs = (x for x in ancestors(node) if x.op == "placeholder")
        return any(x in given for read in inputs for x in shadow.dynamo_of.get(read, ()))

    return is_given
