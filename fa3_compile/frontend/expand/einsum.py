"""`torch.einsum` of three tensors and more, written out in the Dynamo graph two at a time.

`einsum("bhqk,bhkd,hde->bqe", weights, v, projection)` is the product with V and a projection in one
call, whose first result is no node of the graph. It is replaced by the calls that PyTorch makes of
it, in its order: the one that opt_einsum finds where that is installed, else from left to right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from fa3_compile.frontend.dynamo import transforms
from fa3_compile.frontend.dynamo.graph import computing_fakes, example_value

# A letter for the axes of an ellipsis.
REST = "."


def expand_products(graph: fx.Graph) -> int:
    """Writes out every such call; returns how many."""
    found = [node for node in graph.nodes if _operands(node)]
    # Under vmap, what a node is an example of has fewer axes than the letters say.
    spans = transforms.spans(graph) if found else ()
    transformed = {node for span in spans for node in span.nodes}
    found = [node for node in found if node not in transformed]
    for node in found:
        _expand(graph, node)
    return len(found)


def _operands(node: fx.Node) -> list[fx.Node]:
    """The tensors of an einsum in letters, if there are more than two, and plain ones."""
    if node.target is not torch.functional.einsum:
        return []
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = [*operands[0]]
    tensors = [x for x in operands if isinstance(x, fx.Node)]
    if not isinstance(equation, str) or not len(tensors) == len(operands) > 2:
        return []
    plain = all(type(example_value(x)) is FakeTensor for x in (node, *tensors))
    return tensors if plain else []


def _expand(graph: fx.Graph, node: fx.Node) -> None:
    operands = _operands(node)
    whole = example_value(node)
    terms, output = _terms(node.args[0])
    left = [*zip(terms, operands, strict=True)]
    with graph.inserting_before(node), computing_fakes(whole.fake_mode):
        for i, j in _order(node.args[0], operands):
            pair = left[i], left[j]
            left = [x for n, x in enumerate(left) if n not in (i, j)]
            letters = "".join(dict.fromkeys(pair[0][0] + pair[1][0]))
            wanted = {*output}.union(*(term for term, _ in left))
            kept = "".join(x for x in letters if x in wanted) if left else output
            equation = f"{pair[0][0]},{pair[1][0]}->{kept}".replace(REST, "...")
            factors = [x for _, x in pair]
            made = graph.call_function(torch.functional.einsum, (equation, *factors))
            # Autocast, where there is one, has given the whole its type.
            fakes = [example_value(x).to(whole.dtype) for x in factors]
            made.meta.update(node.meta, example_value=torch.einsum(equation, *fakes))
            left.append((kept, made))
    node.replace_all_uses_with(left[0][1])
    graph.erase_node(node)


def _terms(equation: str) -> tuple[list[str], str]:
    """The letters of each operand and of the result, which may be left to the equation's rule."""
    given, arrow, output = equation.replace(" ", "").replace("...", REST).partition("->")
    if not arrow:
        counts = Counter(given.replace(",", ""))
        output = REST * (REST in counts)
        output += "".join(x for x in sorted(counts) if counts[x] == 1 and x.isalpha())
    return given.split(","), output


def _order(equation: str, operands: Sequence[fx.Node]) -> list[tuple[int, int]]:
    """Which two are taken from what is left, one after another; their product is put last."""
    finder = torch.backends.opt_einsum
    if finder.enabled and finder.is_available():
        fakes = map(example_value, operands)
        return finder.get_opt_einsum().contract_path(equation, *fakes, optimize=finder.strategy)[0]
    return [(0, 1), *((n, 0) for n in range(len(operands) - 2, 0, -1))]
