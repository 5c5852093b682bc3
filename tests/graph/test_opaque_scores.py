"""Scores that come through a call that is not looked into are reported, with the call's line."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.graph.harness import check
from tests.graph.inputs import B, D, H, S, normal, qkv, scores_of

HIDDEN = {
    "cdist": lambda q, k: -torch.cdist(q, k),
    "layer_norm": lambda q, k: F.layer_norm(scores_of(q, k), (S,)),
    "sort": lambda q, k: scores_of(q, k).sort(-1).values,
    "linear": lambda q, k: F.linear(scores_of(q, k).mT, torch.eye(S)).mT,
}


def padded_convolution(q, k):
    s = F.pad(scores_of(q, k).tril(), (1, 1, 2, 0))
    return F.conv2d(s, torch.full((H, H, 3, 3), 0.1))


HIDDEN["conv2d"] = padded_convolution


@pytest.mark.parametrize("name", HIDDEN)
def test_reported(name):
    report = check(lambda q, k, v: HIDDEN[name](q, k).softmax(-1) @ v, *qkv())
    [region] = report.regions
    assert (region.fused, region.code, region.node) == (False, "opaque-scores", name)
    assert "test_opaque_scores.py" in region.where and region.reason and region.hint


def test_a_sink_beside_hidden_scores_of_lengths_that_are_symbols():
    def attention(q, k, v, sink):
        s = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(*q.shape[:-1], -1)
        s = s.sort(-1).values
        column = sink[:, None, None].expand(*s.shape[:-1], 1)
        return torch.cat((s, column), -1).softmax(-1)[..., :-1] @ v

    assert not check(attention, *qkv(), normal(H), dynamic=True).fused


def mixed_by_a_layer(scores, matrix):
    return F.linear(scores.permute(0, 2, 3, 1), matrix).permute(0, 3, 1, 2)


TALKING = {
    "before and after": (
        lambda s, m: mixed_by_a_layer(mixed_by_a_layer(s, m).softmax(-1), m),
        ("opaque-scores", "linear"),
    ),
    "after": (
        lambda s, m: F.conv2d(s.softmax(-1), m[:, :, None, None]),
        ("opaque-weights", "conv2d"),
    ),
    "normed": (
        lambda s, m: F.layer_norm(s.softmax(-1), (S,)),
        ("opaque-weights", "layer_norm"),
    ),
}


@pytest.mark.parametrize("name", TALKING)
def test_weights_by_way_of_a_call(name):
    """Talking heads (Shazeer et al. 2020), the heads mixed by a layer or a convolution."""
    weights, (code, node) = TALKING[name]
    report = check(lambda q, k, v, m: weights(scores_of(q, k), m) @ v, *qkv(), normal(H, H))
    [region] = report.regions
    assert (region.fused, region.code, region.node) == (False, code, node)
    assert region.reason and region.hint


def test_weights_times_the_signs_of_their_scores():
    """Cog attention (Lv et al. 2024)."""

    def attention(q, k, v):
        s = scores_of(q, k)
        return (s.abs().softmax(-1) * s.sign()) @ v

    [region] = check(attention, *qkv()).regions
    assert region.code == "scores-read" and "the weights are multiplied by" in region.reason


def heads_of(x):
    return F.linear(x, torch.eye(D)).unflatten(-1, (H, -1)).transpose(1, 2)


def of_queries(x, layer):
    """Synthesizer (Tay et al. 2021), section 3.1; outlook attention is of this kind."""
    return F.linear(x, layer).unflatten(-1, (H, S)).transpose(1, 2).softmax(-1) @ heads_of(x)


def of_keys(x, layer):
    """Efficient attention (Shen et al. 2021): features of keys, each normalised over the keys."""
    keys = F.linear(x, layer).unflatten(-1, (H, S)).permute(0, 2, 3, 1)
    return keys.softmax(-1) @ heads_of(x)


@pytest.mark.parametrize("function", [of_queries, of_keys])
def test_scores_of_one_tensor(function):
    report = check(function, normal(B, S, D), normal(H * S, D))
    [region] = report.regions
    assert region.code == "no-product" and "one tensor" in region.reason


class Choice(torch.nn.Module):
    """A soft choice among parameters."""

    def __init__(self):
        super().__init__()
        self.layer, self.table = torch.nn.Linear(D, S), torch.nn.Parameter(torch.ones(S, D))

    def forward(self, x):
        return self.layer(x).softmax(-1) @ self.table


def test_a_choice_among_parameters_is_no_attention():
    assert not check(Choice(), normal(B, S, D)).regions


def additive(q, k):
    """Bahdanau et al. (2015), section A.1.2."""
    pairs = torch.tanh(q.unsqueeze(-2) + k.unsqueeze(-3))
    return F.linear(pairs, torch.full((1, q.shape[-1]), 0.3)).squeeze(-1)


def perceptron_of_pairs(q, k):
    shape = (*q.shape[:-1], *k.shape[-2:])
    pairs = torch.cat([q.unsqueeze(-2).expand(shape), k.unsqueeze(-3).expand(shape)], -1)
    return F.linear(pairs, torch.full((1, pairs.shape[-1]), 0.3))[..., 0]


BROADCAST = {
    "additive": additive,
    "perceptron of pairs": perceptron_of_pairs,
    "cosines": lambda q, k: F.cosine_similarity(q[..., None, :], k[..., None, :, :], dim=-1),
    "squared distances": lambda q, k: -(q[..., None, :] - k[..., None, :, :]).pow(2).sum(-1),
    "distances": lambda q, k: -(q[..., None, :] - k[..., None, :, :]).norm(dim=-1),
    "terms": lambda q, k: F.leaky_relu(q[..., :1] + k[..., None, :, 0], 0.2),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", BROADCAST)
def test_scores_without_a_product_are_reported(name, dynamic):
    report = check(lambda q, k, v: BROADCAST[name](q, k).softmax(-1) @ v, *qkv(), dynamic=dynamic)
    assert [(x.fused, x.code) for x in report.regions] == [(False, "no-product")]


NO_ATTENTION = {
    "codebook by broadcasting": lambda x, w, e: (
        -(x[:, :, None] - w).pow(2).sum(-1).softmax(-1).mean(1)
    ),
    "pooling by a product": lambda x, w, e: (x * w[0]).sum(-1).softmax(-1)[:, None] @ x,
    "router": lambda x, w, e: torch.einsum("bne,edf,bnd->bnf", F.linear(x, w).softmax(-1), e, x),
    "router of a norm": lambda x, w, e: F.linear(F.layer_norm(x, (8,)), w).softmax(-1) @ e[:, 0],
    "pooling": lambda x, w, e: F.linear(x, w[:1]).softmax(1).mT @ x,
    "distances to a codebook": lambda x, w, e: (-torch.cdist(x, w)).softmax(-1).mean(1),
}


@pytest.mark.parametrize("name", NO_ATTENTION)
def test_not_reported(name):
    tensors = normal(3, 12, 8), normal(4, 8, seed=1), normal(4, 8, 8, seed=2)
    assert not check(NO_ATTENTION[name], *tensors).regions


def test_squared_distances_written_out_are_fused():
    def attention(q, k, v):
        squares = (q * q).sum(-1)[..., None] + (k * k).sum(-1)[..., None, :]
        return (2 * q @ k.mT - squares).softmax(-1) @ v

    assert [region.fused for region in check(attention, *qkv()).regions] == [True]


def test_values_weighed_element_by_element_are_reported():
    # No node of the program holds the normalised queries and keys, so that there is no product.
    def attention(q, k, v):
        w = F.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1).softmax(-1)
        return (w[..., None] * v[:, :, None]).sum(3)

    [region] = check(attention, *qkv()).regions
    assert (region.code, region.fused) == ("no-product", False)
    assert region.reason == "V is weighed by a sum of element-wise products"


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.router = torch.nn.Parameter(normal(8, 4).detach())
        self.w = torch.nn.Parameter(normal(4, 8, 8).detach())

    def forward(self, x):
        gates = torch.einsum("bsc,ce->bse", x, self.router).softmax(-1)
        return (gates.unsqueeze(-1) * torch.einsum("bsc,ecd->bsed", x, self.w)).sum(2)


def test_outputs_of_experts_are_not():
    assert not check(Experts(), normal(2, S, 8)).regions
