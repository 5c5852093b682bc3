"""AttentionSpec: what it refuses, and its text."""

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from fa3_compile.spec.attention import OUT_ORDERS, AttentionSpec
from fa3_compile.spec.text import parse, text
from tests.spec.by_hand import masks, scores

CAUSAL = parse("kv <= q")
TEXTS = [
    "attention(score=s)",
    "attention(score=0.125*s, mask=kv <= q, dead=nan)",
    "attention(score=s, mask=load(0, b, 0, q, kv) != 0, dead=zero, aux=[bool])",
    "attention(score=s, mask=kv <= q, dead=score, fill=-3.4028234663852886e+38)",
    "attention(score=(kv - q)*load(0, h) + 0.125*s, aux=[float], out_order=bqhd)",
    "attention(score=s, sinks=[load(0, h), 0], aux=[float])",
    "attention(score=s, mask=kv < n1, dead=nan)",
]


@pytest.mark.parametrize("source", TEXTS)
def test_text(source):
    assert str(AttentionSpec.parse(source)) == source


def test_fields():
    spec = AttentionSpec.parse(TEXTS[6])
    assert spec.size_count == 2 and spec.has_mask
    assert not AttentionSpec().has_mask and AttentionSpec().size_count == 0
    spec = AttentionSpec.parse(TEXTS[3])
    assert spec.expressions == (spec.score, spec.mask, spec.fill)


@given(
    scores,
    masks,
    st.sampled_from(["nan", "zero", "score"]),
    st.lists(scores, max_size=2),
    st.sampled_from(OUT_ORDERS),
)
@settings(max_examples=60)
def test_round_trip(score, mask, dead, sinks, order):
    if mask == sympy.true:  # without a mask there are no dead rows, and the text has no `dead`
        dead = "nan"
    fill = sympy.Float(-1e9) if dead == "score" else None
    score, mask, *sinks = (parse(text(x)) for x in (score, mask, *sinks))
    spec = AttentionSpec(score, mask, dead, fill, tuple(sinks), (), order)
    assert AttentionSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    "fields",
    [
        {"dead": "maybe"},
        {"fill": sympy.Float(-1e9)},
        {"mask": CAUSAL, "dead": "score"},
        {"aux": ("complex",)},
        {"out_order": "dhqb"},
        {"mask": parse("s < 0")},
        {"score": parse("load(0, q)")},
        {"score": parse("load(1, q)"), "aux": ("float",)},
    ],
    ids=str,
)
def test_what_makes_no_attention(fields):
    with pytest.raises(ValueError):
        AttentionSpec(**fields)


@pytest.mark.parametrize(
    "source",
    [
        "attention(s)",
        "attention(score=s, score=s)",
        "attention(score=s, dead='nan')",
        "attention(score=s, color=red)",
        "attention(score=s, aux=[1])",
        "attention(score=s).x",
        "attention(**s)",
        "Attention(score=s)",
        "attention(score=open('/etc/passwd'))",
    ],
)
def test_any_other_text_is_refused(source):
    with pytest.raises(ValueError):
        AttentionSpec.parse(source)
