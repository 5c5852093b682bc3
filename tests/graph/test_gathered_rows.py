"""Biases whose rows a table that learns in half precision is gathered for."""

from __future__ import annotations

import operator

import pytest
import torch

from fa3_compile.frontend.dynamo.graph import example_value
from tests.graph.harness import check, rewrite_only, specs
from tests.graph.inputs import H, S, attend, normal, qkv

ROWS = 5
AT = torch.randint(ROWS, (S, S), generator=torch.Generator().manual_seed(0))
GATHERS = {
    "by an index": (lambda w, at: w[at].permute(2, 0, 1), (ROWS, H)),
    "of columns": (lambda w, at: w[:, at], (H, ROWS)),
    "flattened, as Swin does": (
        lambda w, at: w[at.view(-1)].view(S, S, -1).permute(2, 0, 1).contiguous().unsqueeze(0),
        (ROWS, H),
    ),
    "selected": (
        lambda w, at: torch.index_select(w, 1, at.flatten()).unflatten(1, (S, S)),
        (H, ROWS),
    ),
    "and a function of them": (lambda w, at: 2 * torch.sigmoid(w[:, at]), (H, ROWS)),
}


def gathered(made, w, at, dtype=torch.bfloat16) -> list[torch.dtype]:
    """The types in which rows are gathered, in the rewritten graph."""
    types = []

    def backend(gm, inputs):
        gm = rewrite_only(gm, inputs)
        for node in gm.graph.nodes:
            if node.target in (operator.getitem, torch.index_select) and node.users:
                table = example_value(node.args[0])
                types.extend([table.dtype] if isinstance(table, torch.Tensor) else [])
        return gm

    q, k, v = (x.to(dtype) for x in qkv())
    torch.compile(lambda q, k, v, w, at: attend(q @ k.mT + made(w, at), v), backend=backend)(
        q, k, v, w, at
    )
    return types


@pytest.mark.parametrize("name", GATHERS)
def test_of_a_table_that_learns_in_float32(name: str) -> None:
    made, shape = GATHERS[name]
    w = normal(*shape).to(torch.bfloat16).detach().requires_grad_()
    assert gathered(made, w, AT) == [torch.float32]
    assert gathered(made, w.detach(), AT) == [torch.bfloat16]
    wide = normal(*shape).detach().requires_grad_()
    assert gathered(made, wide, AT, torch.float32) == [torch.float32]

    def attention(q, k, v, w, at):
        return attend(q @ k.mT + made(w, at), v)

    q, k, v = (x.to(torch.bfloat16).detach().requires_grad_() for x in qkv())
    report = check(attention, q, k, v, w, AT, training=True)
    assert report.fused and "load(0, h, q, kv)" in specs(report)


def test_that_two_layers_and_the_caller_read() -> None:
    """The rows themselves are the bias, and are returned."""

    def layers(q, k, v, w, at):
        bias = w[:, at]
        q = attend(q @ k.mT + bias, v)
        return attend(q @ k.mT + bias, v), bias

    w = normal(H, ROWS).to(torch.bfloat16).detach().requires_grad_()
    q, k, v = (x.to(torch.bfloat16).detach().requires_grad_() for x in qkv())
    report = check(layers, q, k, v, w, AT, training=True)
    assert len(specs(report).splitlines()) == 2


def test_nothing_else_is_touched() -> None:
    """Rows that are gathered for keys, and for what becomes a bias by a product."""

    def attention(q, k, v, w, at, tokens):
        k = k + w[tokens]
        return attend(q @ k.mT + w[tokens] @ w[at[0]].mT, v)

    types = []

    def backend(gm, inputs):
        gm = rewrite_only(gm, inputs)
        types.extend(example_value(x).dtype for x in gm.graph.nodes if x.target is operator.getitem)
        return gm

    q, k, v = (x.to(torch.bfloat16) for x in qkv())
    w = normal(ROWS, k.shape[-1]).to(torch.bfloat16).detach().requires_grad_()
    tokens = torch.arange(S) % ROWS
    torch.compile(attention, backend=backend)(q, k, v, w, AT, tokens)
    assert types and torch.float32 not in types
