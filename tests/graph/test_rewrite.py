"""What the rewrite leaves: one operator in the graph that Dynamo gave, and nothing that is dead."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline

from fa3_compile.frontend.expand.spell_out import SPELLED_OUT
from fa3_compile.frontend.rewrite.emit import Emitter
from fa3_compile.options import Options
from fa3_compile.pipeline import rewrite_attention
from fa3_compile.report import collect
from tests.graph.harness import check, specs
from tests.graph.inputs import INF, SCALE, B, D, H, S, attend, normal, qkv, scores_of, uniform

OPTIONS = Options(kernels=("reference",), strict=True)


def rewritten(function, *args, options: Options = OPTIONS) -> torch.fx.Graph:
    """The Dynamo graph after the pass."""
    graphs = []

    def backend(gm, example_inputs):
        rewrite_attention(gm, options, "graph")
        graphs.append(gm.graph)
        return gm

    torch.compile(function, backend=backend)(*args)
    [graph] = graphs
    return graph


def listing(graph: torch.fx.Graph) -> str:
    """A line for each node: `name = operator(arguments)`; the spec without its suffix."""
    lines = []
    for node in graph.nodes:
        arguments = ", ".join(_text(x) for x in node.args)
        target = node.target if isinstance(node.target, str) else node.target.__name__
        if node.op == "output":
            lines.append(f"return {arguments}")
        elif node.op != "placeholder":
            lines.append(f"{node.name} = {target}({arguments})")
    return "\n".join(lines)


def _text(x) -> str:
    return x.split(" #")[0] if isinstance(x, str) else str(x)


def targets(graph: torch.fx.Graph) -> list[str]:
    return [getattr(n.target, "__name__", str(n.target)) for n in graph.nodes]


def attentions(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    return [n for n in graph.nodes if n.target is torch.ops.fa3.attention.default]


def test_plain():
    assert_expected_inline(
        listing(rewritten(lambda q, k, v: attend(scores_of(q, k), v), *qkv())),
        """\
attention_default = attention.default(l_q_, l_k_, l_v_, [], [], attention(score=0.25*s))
getitem = getitem(attention_default, 0)
return (getitem,)""",
    )


def test_batch_of_one_is_viewed():
    q, k, v = (x[:1] for x in qkv())
    made = targets(rewritten(lambda q, k, v: attend(scores_of(q, k), v), q, k, v))
    # The gradient of `select` would be a copy among zeros.
    assert made.count("squeeze") == 3 and "select" not in made


def test_heads_split_and_merged():
    def attention(x):
        q, k, v = (t.view(B, S, H, D).transpose(1, 2) for t in x.chunk(3, -1))
        y = attend(scores_of(q, k).masked_fill(torch.ones(S, S).triu(1).bool(), -INF), v)
        return y.transpose(1, 2).reshape(B, S, H * D)

    # The mask's own nodes are gone; the output is written in the order in which it is read.
    assert_expected_inline(
        listing(rewritten(attention, normal(B, S, 3 * H * D))),
        """\
unflatten = unflatten(l_x_, 2, [12, 16])
narrow = narrow(unflatten, 2, 0, 4)
permute = permute(narrow, [0, 2, 1, 3])
unflatten_1 = unflatten(l_x_, 2, [12, 16])
narrow_1 = narrow(unflatten_1, 2, 4, 4)
permute_1 = permute(narrow_1, [0, 2, 1, 3])
unflatten_2 = unflatten(l_x_, 2, [12, 16])
narrow_2 = narrow(unflatten_2, 2, 8, 4)
permute_2 = permute(narrow_2, [0, 2, 1, 3])
attention_default = attention.default(permute, permute_1, permute_2, [], [], attention(score=0.25*s, mask=kv <= q, dead=nan, out_order=bqhd))
getitem_3 = getitem(attention_default, 0)
permute_3 = permute(getitem_3, [0, 2, 1, 3])
reshape_1 = reshape(permute_3, [2, 24, 64])
return (reshape_1,)""",
    )


def test_grouped_heads():
    def attention(q, k, v):
        k, v = (x[:, :, None].expand(B, 2, 2, S, D).reshape(B, 4, S, D) for x in (k, v))
        return attend(scores_of(q, k), v)

    graph = rewritten(attention, qkv()[0], normal(B, 2, S, D), normal(B, 2, S, D))
    assert_expected_inline(
        listing(graph),
        """\
unflatten = unflatten(l_q_, 1, [2, 2])
reshape_2 = reshape(unflatten, [2, 4, 24, -1])
attention_default = attention.default(reshape_2, l_k_, l_v_, [], [], attention(score=0.25*s))
getitem_2 = getitem(attention_default, 0)
reshape_3 = reshape(getitem_2, [2, 2, 2, 24, 16])
reshape_4 = reshape(reshape_3, [2, 4, 24, 16])
return (reshape_4,)""",
    )


def test_captured_tensors():
    def attention(q, k, v, padding, bias):
        s = scores_of(q, k) + bias
        return attend(s.masked_fill(padding[:, None, None, :] == 0, -INF), v)

    padding = torch.ones(B, S, dtype=torch.long)
    graph = rewritten(attention, *qkv(), padding, normal(H, S, S))
    # Each tensor is captured as the program holds it, without a broadcast or a cast.
    assert_expected_inline(
        listing(graph),
        """\
attention_default = attention.default(l_q_, l_k_, l_v_, [l_padding_, l_bias_], [], attention(score=load(1, h, q, kv) + 0.25*s, mask=load(0, b, kv) != 0, dead=nan, aux=[int, float]))
getitem_1 = getitem(attention_default, 0)
return (getitem_1,)""",
    )


def test_in_place_mask_goes_with_the_scores():
    def attention(q, k, v):
        s = q @ k.mT
        s *= SCALE
        s.masked_fill_(torch.ones(S, S, dtype=torch.bool).triu(1), -INF)
        weights = F.dropout(s.softmax(-1), 0.1, training=False)
        return weights @ v

    assert_expected_inline(
        listing(rewritten(attention, *qkv())),
        """\
attention_default = attention.default(l_q_, l_k_, l_v_, [], [], attention(score=0.25*s, mask=kv <= q, dead=nan))
getitem = getitem(attention_default, 0)
return (getitem,)""",
    )


def test_dead_weights_go():
    def attention(q, k, v):
        p = scores_of(q, k).softmax(-1)
        return p @ v, p

    def caller(q, k, v):
        return attention(q, k, v)[0]

    assert "softmax" not in targets(rewritten(caller, *qkv()))


def test_mask_that_something_else_reads_stays():
    def attention(q, k, v):
        mask = torch.full((S, S), -INF).triu(1)
        return attend(scores_of(q, k) + mask, v), mask

    graph = rewritten(attention, *qkv())
    assert "full" in targets(graph)
    assert "matmul" not in targets(graph)


def test_writes_that_something_else_reads_stay():
    def attention(q, k, v):
        mask = torch.zeros(S, S)
        mask.fill_(1.0)
        k.mul_(2)
        return attend(scores_of(q, k) + mask, v), mask

    q, k, v = (x.detach() for x in qkv())
    graph = rewritten(attention, q, k, v)
    assert {"fill_", "mul_"} <= set(targets(graph))
    check(attention, q, k, v, training=False)


def test_random_numbers_stay():
    def attention(q, k, v):
        torch.rand(1)
        return attend(scores_of(q, k), v)

    assert "rand" in targets(rewritten(attention, *qkv()))


def test_view_right_after_the_attention():
    # `.view` needs the strides that eager's output has.
    def attention(q, k, v):
        y = torch.einsum("bhqk,bkhd->bqhd", scores_of(q, k).softmax(-1), v)
        return y.contiguous().view(B, S, H * D)

    def merged(q, k, v):
        y = attend(scores_of(q, k), v)
        return y.view(B, H, S * D), y.view(B, H, S, 4, 4)

    q, k, v = qkv()
    assert specs(check(attention, q, k, normal(B, S, H, D))) == (
        "attention(score=0.25*s, out_order=bqhd)"
    )
    assert specs(check(merged, q, k, v)) == "attention(score=0.25*s)"


def test_queries_that_lie_side_by_side():
    """V^T P^T is [.., d, q] in eager memory, which what follows may count on."""

    def attention(q, k, v):
        out = v.mT @ scores_of(q, k).softmax(-1).mT
        return out.relu().view(B, -1), out.as_strided((B, S), (H * D * S, 1)) * out.stride(-2)

    report = check(attention, *qkv())
    assert len(report.fused) == 1
    assert "contiguous" in targets(rewritten(attention, *qkv()))

    def transposed(q, k, v):
        return (v.mT @ scores_of(q, k).softmax(-1).mT).mT

    assert "contiguous" not in targets(rewritten(transposed, *qkv()))


def test_dimensions_that_are_taken_away_in_place():
    def attention(q, k, v):
        return attend(scores_of(q, k), v).squeeze_(0).relu()

    report = check(attention, *(x[:1].detach() for x in qkv()), training=False)
    assert len(report.fused) == 1


def test_inputs_of_unusual_strides():
    q, k, v = (x.detach() for x in qkv(B, S, H, D))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    padded = torch.randn(B, H, S, 2 * D)[..., ::2]
    check(lambda q, k, v: attend(scores_of(q, k), v), q, padded, v)


def _result(q, k, v, bias):
    """As in Nyströmformer."""
    out = attend(scores_of(q, k) + bias, v)
    out += v
    return out.transpose(1, 2).reshape(B, S, H * D)


def _captured(q, k, v, bias):
    bias = bias + 0
    out = attend(scores_of(q, k) + bias, v)
    bias.mul_(3)
    return out + bias.sum()


def _operand(q, k, v, bias):
    q = q + 0
    out = attend(scores_of(q * 0.3, k) + bias, v)
    q.add_(1)
    return out + q


@pytest.mark.parametrize("function", [_result, _captured, _operand])
def test_written_later(function):
    """The operator's backward reads again what eager's does not keep."""
    qkv_ = [x.requires_grad_() for x in qkv()]
    report = check(function, *qkv_, normal(H, S, S))
    assert [r.fused for r in report.regions] == [True]
    # Without gradients nothing is copied.
    with torch.no_grad():
        assert "clone" not in targets(rewritten(function, *qkv_, normal(H, S, S)))


def test_metadata_of_the_output_is_kept():
    def attention(q, k, v):
        return attend(scores_of(q, k), v) + 1

    graph = rewritten(attention, *qkv())
    [add] = [n for n in graph.nodes if n.name == "add"]
    value = add.args[0].meta["example_value"]
    assert value.shape == (B, H, S, D) and value.requires_grad


def test_two_layers_share_their_bias():
    def attention(q, k, v, bias):
        y = attend(scores_of(q, k) + bias, v)
        return attend(scores_of(y, k) + bias, v)

    graph = rewritten(attention, *qkv(), normal(S, S))
    first, second = attentions(graph)
    assert first.args[3] == second.args[3]
    assert first.args[5] == second.args[5]


def test_fuel_stops_after_a_number_of_rewrites():
    def attention(q, k, v):
        for _ in range(3):
            q = attend(scores_of(q, k), v)
        return q

    for fuel in range(4):
        options = Options(kernels=("reference",), strict=True, fuel=fuel)
        torch._dynamo.reset()
        assert len(attentions(rewritten(attention, *qkv(), options=options))) == fuel


def test_graph_without_attention_is_untouched():
    def model(x):
        return x.softmax(-1) @ x

    seen = []

    def backend(gm, example_inputs):
        before = str(gm.graph)
        rewrite_attention(gm, OPTIONS, "graph")
        seen.append(before == str(gm.graph))
        return gm

    torch.compile(model, backend=backend)(uniform(S, S))
    assert seen == [True]


def test_graph_that_cannot_be_written_is_untouched(monkeypatch):
    def broken(self, *args):
        self.call("narrow", args[0], 0, 0, 1000)

    monkeypatch.setattr(Emitter, "output", broken)

    def model(q, k, v):
        weights = F.dropout(scores_of(q, k).softmax(-1), 0.1)
        return weights @ v

    seen = []

    def backend(gm, example_inputs):
        before = str(gm.graph)
        rewrite_attention(gm, Options(kernels=("reference",)), "graph")
        seen.append(before == str(gm.graph))
        return gm

    with collect() as report:
        torch.compile(model, backend=backend)(*qkv())
    assert seen == [True] and specs(report) == "analysis: internal-error"


def test_a_call_that_cannot_be_read_is_taken_as_given(monkeypatch):
    def broken(x):
        raise ValueError

    monkeypatch.setitem(SPELLED_OUT, torch.tanh, broken)
    report = check(lambda q, k, v: attend(scores_of(q, torch.tanh(k)), v), *qkv())
    assert specs(report) == "attention(score=0.25*s)"


def test_declined_graph_is_untouched():
    def attention(q, k, v):
        return scores_of(q, k).softmax(-2) @ v

    seen = []

    def backend(gm, example_inputs):
        before = str(gm.graph)
        rewrite_attention(gm, OPTIONS, "graph")
        seen.append(before == str(gm.graph))
        return gm

    torch.compile(attention, backend=backend)(*qkv())
    assert seen == [True]


def test_the_spec_names_the_sources_and_options():
    graph = rewritten(lambda q, k, v: attend(scores_of(q, k), v), *qkv())
    [op] = attentions(graph)
    body, _, suffix = op.args[5].partition(" #")
    assert body == "attention(score=0.25*s)"
    assert suffix


def test_booleans_among_the_outputs():
    def attention(q, k, v):
        scores = q @ k.mT
        return scores.softmax(-1) @ v, (q > 0).any(-1)

    [region] = check(attention, *qkv()).regions
    assert region.fused
