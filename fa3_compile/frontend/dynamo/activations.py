"""What a program computes from its inputs, as opposed to what belongs to the model.

A perceptron is two products with something between them, as attention is: f(x A) B. What tells
them apart is that the keys and values of attention come with the data.
"""

from __future__ import annotations

import torch
from torch import fx

from fa3_compile.frontend.dynamo.graph import example_value, storage_of
from fa3_compile.frontend.dynamo.mutations import is_mutation, mutated_nodes


def activations(graph: fx.Graph) -> set[fx.Node]:
    """The nodes of a Dynamo graph whose value depends on an input of the program; a cache into
    which the program writes does."""
    found: set[fx.Node] = set()
    written: set[int | None] = set()
    for node in graph.nodes:
        given = node.op == "placeholder" and not _belongs_to_model(node)
        if given and isinstance(example_value(node), torch.Tensor):
            found.add(node)
        elif any(source in found for source in node.all_input_nodes):
            found.add(node)
            if is_mutation(node):
                written |= {storage_of(x) for x in mutated_nodes(node)} - {None}
                found.update(mutated_nodes(node))
        elif written and storage_of(node) in written:
            found.add(node)
    return found


def _belongs_to_model(placeholder: fx.Node) -> bool:
    """Whether a placeholder is a parameter, a buffer or another tensor that a module keeps."""
    if isinstance(example_value(placeholder), torch.nn.Parameter):
        return True
    source = getattr(placeholder, "_dynamo_source", None)
    kind = getattr(source, "guard_source", "")
    return "NN_MODULE" in str(kind() if callable(kind) else kind)
