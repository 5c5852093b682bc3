"""What is the same along the diagonals of queries and keys is read as a vector by the distance."""

from __future__ import annotations

import math
import operator

import pytest
import torch
import torch.nn.functional as F

from fa3_compile.frontend.dynamo.graph import example_value
from tests.graph.harness import check, rewrite_only, specs
from tests.graph.inputs import INF, H, S, attend, normal, qkv


def buckets(relative, *, both=True, count=8, most=20):
    """T5's of kv - q, as Hugging Face writes them."""
    found = 0
    if both:
        count //= 2
        found = (relative > 0).to(torch.long) * count
        relative = torch.abs(relative)
    else:
        relative = -torch.min(relative, torch.zeros_like(relative))
    exact = count // 2
    far = torch.log(relative.float() / exact) / math.log(most / exact) * (count - exact)
    far = exact + far.to(torch.long)
    far = torch.min(far, torch.full_like(far, count - 1))
    return found + torch.where(relative < exact, relative, far)


def distance(queries, keys, first=0):
    return torch.arange(keys)[None, :] - torch.arange(queries)[:, None] - first


def bias_of(weight, relative, **how):
    return F.embedding(buckets(relative, **how), weight).permute(2, 0, 1).unsqueeze(0)


def causal(relative):
    return torch.where(relative <= 0, 0.0, -INF)


def read(made, *inputs, queries=S, training=True, like=torch.float32):
    """The score of attention with what is made of (queries, keys, *inputs) added."""

    def attention(q, k, v, *rest):
        s = q @ k.mT
        return attend(s + made(s.shape[-2], s.shape[-1], *rest), v)

    q, k, v = (x.to(like).detach().requires_grad_() for x in qkv())
    q = q[:, :, :queries]
    report = check(attention, q, k, v, *inputs, training=training)
    return specs(report).removeprefix("attention(score=").rpartition(" + s")[0]


OF_T5 = {
    "both ways": (lambda n, m, w: bias_of(w, distance(n, m)), "load(0, h, kv - q + 23)"),
    "causal, five keys before": (
        lambda n, m, w: bias_of(w, distance(n, m, first=5), both=False) + causal(distance(n, m, 5)),
        "load(0, h, kv - q + 23)",
    ),
    "the last rows of all": (
        lambda n, m, w: bias_of(w, distance(m, m), both=False)[:, :, -n:],
        "load(0, h, kv - q + 4)",
    ),
    "a table that is indexed": (
        lambda n, m, w: w[buckets(distance(n, m)) - 8].permute(2, 0, 1),
        "load(0, h, kv - q + 23)",
    ),
    "a table that is turned": (
        lambda n, m, w: w.t()[:, buckets(distance(n, m))],
        "load(0, h, kv - q + 23)",
    ),
    "rows of a table from the second on": (
        lambda n, m, w: w[1:][buckets(distance(n, m), count=4)].permute(2, 0, 1),
        "load(1, where(load(0, kv - q + 23) < 0, load(0, kv - q + 23) + 7, load(0, kv - q + 23))"
        " + 1, h)",
    ),
    "keys before queries": (
        lambda n, m, w: w[buckets(distance(m, n)).t()].permute(2, 0, 1),
        "load(0, h, kv - q + 23)",
    ),
    "a factor of each head": (
        lambda n, m, w: bias_of(w, distance(n, m)) * w[0].view(-1, 1, 1),
        "load(0, h, kv - q + 23)*load(1, 0, h)",
    ),
}


@pytest.mark.parametrize("name", OF_T5)
def test_buckets_of_t5(name):
    made, score = OF_T5[name]
    queries = 5 if "last rows" in name else S
    assert read(made, normal(8, H), queries=queries) == score


def gaussian(n, m):
    return (-(distance(n, m).float() / 3).square()).exp()


def windows(n, m):
    return torch.where(distance(n, m).float().abs().log1p() < 1.5, 0.0, -INF)


READ = {
    "a function of the distance": (gaussian, "load(0, kv - q + 23)"),
    "positions in float32": (
        lambda n, m: (torch.arange(m).float() - torch.arange(n).float()[:, None]).abs().sqrt(),
        "load(0, kv - q + 23)",
    ),
    "heads of their own": (
        lambda n, m, x: (distance(n, m).abs().float() + 1).log() ** x.exp().view(-1, 1, 1),
        "load(0, h, kv - q + 23)",
    ),
    "the same for all": (
        lambda n, m: gaussian(n, m).expand(2, H, n, m).contiguous(),
        "load(0, kv - q + 23)",
    ),
    "rounded": (lambda n, m: gaussian(n, m).to(torch.bfloat16).float(), "load(0, kv - q + 23)"),
    "positions counted up": (
        lambda n, m: (torch.ones(m).cumsum(0) - torch.ones(n).cumsum(0)[:, None]).sin(),
        "load(0, kv - q + 23)",
    ),
    "clipped and embedded, without a gradient": (
        lambda n, m, x: x.detach()[distance(n, m).float().abs().log1p().long()],
        "load(0, kv - q + 23)",
    ),
}


@pytest.mark.parametrize("name", READ)
def test_other_functions_of_the_distance(name):
    made, score = READ[name]
    inputs = [normal(H).detach()] if "head" in name or "grad" in name else []
    assert read(made, *inputs) == score


def one_changed(n, m):
    found = gaussian(n, m)
    found[3, 5] = 7.0
    return found


def counted(n, m, ids):
    """Of documents' own positions."""
    return ((ids[None, :] - ids[:, None]).abs() + 1.0).log()


NOT_READ = {
    "one element changed": (one_changed,),
    "a diagonal that ends": (lambda n, m: gaussian(n, m) * (torch.arange(m) < m - 1),),
    "positions that are given": (counted, torch.arange(S)),
    "a tensor that is given": (lambda n, m, x: x.abs().sqrt(), distance(S, S).float()),
    "positions that are rounded": (
        lambda n, m: (torch.arange(m) * 0.1 - (torch.arange(n) * 0.1)[:, None]).sin(),
    ),
    "positions in half precision": (
        lambda n, m: (
            (torch.arange(m) + 300).bfloat16() - (torch.arange(n) + 300).bfloat16()[:, None]
        ).sin(),
    ),
    "a distance in bytes": (
        lambda n, m: (torch.arange(m) * 9).byte()[None].div(2).sin() - torch.arange(n)[:, None],
    ),
    "every second key": (lambda n, m: (torch.arange(m) - 2 * torch.arange(n)[:, None]).sin(),),
    "a slope that learns": (lambda n, m, x: -(distance(n, m).abs() * x).exp(), normal(1)),
    "noise": (lambda n, m: (gaussian(n, m) + 0 * torch.rand(n, m)).sin(),),
}


@pytest.mark.parametrize("name", NOT_READ)
def test_near_misses(name):
    made, *inputs = NOT_READ[name]
    score = read(made, *inputs)
    assert "kv - q" not in score and "q - kv" not in score


def test_places_that_are_written_to_before_the_attention():
    def made(n, m, w):
        places = buckets(distance(n, m))
        bias = F.embedding(places, w).permute(2, 0, 1)
        places.zero_()
        return bias

    assert "load(0, kv - q + 23) + 2" in read(made, normal(8, H), training=False)


def test_gradient_of_a_table_whose_places_are_made_without_one():
    def made(n, m, w):
        with torch.no_grad():
            places = buckets(distance(n, m))
        return F.embedding(places, w).permute(2, 0, 1)

    assert read(made, normal(8, H)) == "load(0, h, kv - q + 23)"


def test_a_frozen_table_beside_a_learned_one():
    def made(n, m, w, x):
        with torch.no_grad():
            frozen = bias_of(w, distance(n, m))
        return frozen + bias_of(x, distance(n, m))

    score = read(made, normal(8, H), normal(8, H))
    assert score == "load(0, h, kv - q + 23) + load(1, h, kv - q + 23)"


def test_a_row_that_has_no_gradient():
    """Rows of padding have none in eager: the bias is read as it is, and its gradient is eager's."""

    def made(n, m, w):
        return F.embedding(buckets(distance(n, m)), w, padding_idx=0).permute(2, 0, 1)

    assert read(made, normal(8, H)) == "load(0, h, q, kv)"
    assert read(made, normal(8, H).detach(), training=False) == "load(0, h, kv - q + 23)"


def test_one_vector_for_every_layer():
    graphs = []

    def backend(gm, inputs):
        graphs.append(rewrite_only(gm, inputs))
        return graphs[-1]

    def layers(q, k, v, w):
        bias = bias_of(w, distance(S, S))
        for _ in range(3):
            q = attend(q @ k.mT + bias, v)
        return q

    with torch.no_grad():
        torch.compile(layers, backend=backend)(*qkv(), normal(8, H))
    [gm] = graphs
    logarithms = [n for n in gm.graph.nodes if "log" in str(n.target)]
    read = {n for log in logarithms for n in gm.graph.nodes if n.meta.get("by_distance")}
    assert len(logarithms) == len(read) == 1


@pytest.mark.parametrize("learned", [True, False])
def test_rows_that_many_distances_share_are_summed_in_float32(learned):
    """Of 1,500 keys in bfloat16, the sums were 2.6 times as far from float64."""
    gathered = []

    def backend(gm, inputs):
        gm = rewrite_only(gm, inputs)
        for node in gm.graph.find_nodes(op="call_function", target=operator.getitem):
            value = example_value(node.args[0])
            if isinstance(value, torch.Tensor) and value.shape == (8, H):
                gathered.append(value.dtype)
        return gm

    def attention(q, k, v, w):
        return attend(q @ k.mT + bias_of(w, distance(S, S)), v)

    w = normal(8, H).to(torch.bfloat16).detach().requires_grad_(learned)
    q, k, v = (x.to(torch.bfloat16) for x in qkv())
    out = torch.compile(attention, backend=backend)(q, k, v, w)
    assert out.dtype == torch.bfloat16
    assert gathered == [torch.float32 if learned else torch.bfloat16]


def test_lengths_that_change():
    def attention(q, k, v, w):
        n, m = q.shape[2], k.shape[2]
        return attend(q @ k.mT + bias_of(w, distance(m, m), both=False)[:, :, -n:], v)

    q, k, v = qkv()
    report = check(attention, q[:, :, 7:].detach(), k, v, normal(8, H), dynamic=True)
    assert specs(report) == "attention(score=load(0, h, Sq + kv - q - 1) + s, aux=[float])"
