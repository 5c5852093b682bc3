"""Biases of queries and keys are read with their keys side by side, however the program made them."""

from __future__ import annotations

import pytest
import torch

from tests.graph.harness import check, rewrite_only, specs
from tests.graph.inputs import H, S, attend, normal, qkv

AT = torch.randint(7, (S, S), generator=torch.Generator().manual_seed(0))
C = 5
# What is made of (bias, index), the bias, and the score's term.
MADE = {
    "pairs, permuted": (lambda z, at: z.permute(2, 0, 1), (S, S, H), "load(0, h, q, kv)"),
    "pairs of a linear layer": (
        lambda z, at: (z @ torch.ones(C, H)).movedim(-1, 0).unsqueeze(0),
        (S, S, C),
        "load(0, h, q, kv)",
    ),
    "of each batch": (lambda z, at: z.permute(0, 3, 1, 2), (2, S, S, H), "load(0, b, h, q, kv)"),
    "of heads, then batches": (lambda z, at: z.transpose(0, 1), (H, 2, S, S), "load(0, b, h, q, kv)"),
    "keys, then queries": (lambda z, at: z.mT, (S, S), "load(0, q, kv)"),
    "rows of a table": (lambda z, at: z[at].permute(2, 0, 1), (7, H), "load(0, h, q, kv)"),
    "flat rows": (
        lambda z, at: z[at.view(-1)].view(S, S, -1).permute(2, 0, 1).contiguous()[None],
        (7, H),
        "load(0, h, q, kv)",
    ),
    "flat, of heads": (lambda z, at: z.unflatten(1, (S, S)), (H, S * S), "load(0, h, q, kv)"),
}  # fmt: skip
LEFT = {
    "read twice": (lambda z, at: z.permute(2, 0, 1) + z.permute(2, 1, 0), (S, S, H)),
    "from the second key on": (lambda z, at: z[:, 1:].permute(2, 0, 1), (S, S + 1, H)),
    "every second row": (lambda z, at: z[::2].permute(2, 0, 1), (2 * S, S, H)),
    "flat, another length": (lambda z, at: z[:, : S * S].unflatten(1, (S, S)), (H, S * S + 3)),
    "of keys alone": (lambda z, at: z.mT[:, None], (S, H)),
}


def attention_of(made):
    return lambda q, k, v, z, at: attend(q @ k.mT + made(z, at), v)


def read(made, shape, **options) -> str:
    z = normal(*shape).detach().requires_grad_()
    report = check(attention_of(made), *qkv(), z, AT, **options)
    assert report.fused
    return specs(report).removeprefix("attention(score=").rpartition(" + s")[0]


@pytest.mark.parametrize("name", MADE)
def test_side_by_side(name: str) -> None:
    made, shape, expected = MADE[name]
    assert read(made, shape) == expected


@pytest.mark.parametrize("name", LEFT)
def test_read_where_they_are(name: str) -> None:
    made, shape = LEFT[name]
    assert "h, q, kv)" not in read(made, shape)


def test_given_with_the_keys_apart() -> None:
    """A view that the caller made."""
    z = normal(S, S, H).permute(2, 0, 1)
    strides = []

    def backend(gm, inputs):
        gm = rewrite_only(gm, inputs)
        [node] = gm.graph.find_nodes(op="call_function", target=torch.ops.fa3.attention.default)
        strides.append(node.args[3][0].meta["example_value"].stride())
        return gm

    q, k, v = qkv()
    attention = attention_of(lambda z, at: z)
    out = torch.compile(attention, backend=backend)(q, k, v, z, AT)
    assert strides == [(S * S, S, 1)]
    torch.testing.assert_close(out, attention(q, k, v, z, AT))


def test_of_dynamic_lengths() -> None:
    for made in (
        lambda z, at: z.permute(2, 0, 1),
        lambda z, at: z.flatten(0, 1).unflatten(0, (z.shape[0], z.shape[1])).permute(2, 0, 1),
    ):
        assert read(made, (S, S, H), dynamic=True) == "load(0, h, q, kv)"


def test_held_constant() -> None:
    """What decides the mask has no gradient there."""

    def attention(q, k, v, z):
        seen = z.permute(2, 0, 1) > 0
        return attend((q @ k.mT).masked_fill(~seen, -1e9), v)

    z = normal(S, S, H).detach().requires_grad_()
    report = check(attention, *qkv(), 1 * z, training=True)
    assert report.fused
