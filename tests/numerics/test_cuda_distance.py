"""Which scores the Hopper kernel begins with a table by kv - q, and what is in it."""

from __future__ import annotations

import math

import pytest
import torch

from fa3_compile.lower.choose import Problem
from fa3_compile.lower.kernels import cuda_sm90_keys
from fa3_compile.lower.kernels.cuda_sm90_keys import keys_of, layout_of, table_heads
from fa3_compile.lower.render.cuda_distance import distance_term, scaling
from fa3_compile.spec.attention import AttentionSpec

TABLES = (
    "0.1*s + load(0, h, kv - q + Sq - 1)",
    "0.1*s + load(0, q - kv + 199, h)",
    "0.1*s + 2.0*load(0, h, max(min(kv - q, 7), -7) + 7)",
    "0.1*s + load(0, h, abs(kv - q))*load(0, h, 0)",
    "0.1*s + load(0, h, floordiv(kv - q + n0, 2))",
    "0.1*s + load(0, h, load(1, kv - q + 299))",
    "0.1*s + where(kv - q < -90, load(0, h, 0), load(0, h, kv - q + 90)) + load(0, b, h)",
    "0.1*s - load(0, h, 0)*log(1 + abs(kv - q))",
)
OTHERS = {
    "of two positions": "0.1*s + load(0, h, kv + q)",
    "of the row too": "0.1*s + load(0, h, kv - q + 299) + load(0, q, h)",
    "a slope": "0.1*s + load(0, h, 0)*(kv - q)",
    "a slope to both sides": "0.1*s - load(0, h, 0)*abs(kv - q)",
    "tiles": "0.1*s + load(0, h, floordiv(kv, 2) - floordiv(q, 2) + 150)",
    "a softcap": "20.0*tanh(0.1*s) + load(0, h, kv - q + 299)",
    "a factor of s": "s*load(0, h, kv - q + 299)",
    "a scale that is read": "s*load(0, h, 0) + load(0, h, kv - q + 299)",
    "a negative scale": "-0.1*s + load(0, h, kv - q + 299)",
}


def keys(score: str, mask: str = "", heads: int = 4, lengths: tuple[int, int] = (300, 200),
         dim: int = 64):  # fmt: skip
    spec = AttentionSpec.parse(f"attention(score={score}{mask}, aux=[float, int])")
    aux = [torch.empty(4, 499), torch.empty(499, dtype=torch.int64)]
    problem = Problem(spec, torch.bfloat16, torch.device("cuda:0"), (9, 0), 2, heads, heads,
                      *lengths, dim, dim, aux_dtypes=tuple(x.dtype for x in aux))  # fmt: skip
    return keys_of(problem, layout_of(spec, aux))


@pytest.mark.parametrize("score", TABLES)
@pytest.mark.parametrize("mask", ["", ", mask=kv <= q", ", mask=(kv <= q) & (q - kv < 50)"])
def test_scores_begin_with_a_table(score: str, mask: str) -> None:
    first, *rest = keys(score, mask)
    assert first.by_distance and first.config.dense_first
    assert rest and not any(x.by_distance for x in rest)
    assert "kByDistance = true" in first.source()


@pytest.mark.parametrize("score", OTHERS.values(), ids=OTHERS)
def test_what_is_asked_of_each_element(score: str) -> None:
    assert not any(x.by_distance for x in keys(score))


@pytest.mark.parametrize(
    "options",
    [
        {"mask": ", mask=load(1, q) == load(1, kv)"},  # asked of each element
        {"mask": ", mask=kv <= q, sinks=[load(0, h, 0)]"},
        {"dim": 192},  # queries cannot be held
        {"lengths": (64, 200)},
        {"lengths": (2000, 2**21), "heads": 16},  # 128 MiB
        {"lengths": (70, 2**16), "heads": 1},  # keys are better dealt out
    ],
    ids=str,
)
def test_where_they_do_not(options: dict) -> None:
    assert not any(x.by_distance for x in keys(TABLES[0], **options))


def test_where_no_processor_waits(monkeypatch) -> None:
    """As tests on a GPU ask for the tiles of long inputs."""
    monkeypatch.setattr(cuda_sm90_keys, "processors", lambda device: 0)
    assert keys(TABLES[0], lengths=(70, 2**16), heads=1)[0].by_distance


def test_who_has_a_table_of_its_own() -> None:
    def own(term: str) -> tuple[int, int]:
        spec = AttentionSpec.parse(f"attention(score=0.1*s + {term}, aux=[float])")
        return table_heads(spec, 7, 3)

    assert own("load(0, kv - q + 9)") == (1, 1)
    assert own("load(0, h, kv - q + 9)") == (7, 1)
    assert own("load(0, kv - q + 9)*load(0, b)") == (1, 3)
    assert own("load(0, b, h, kv - q + 9)") == (7, 3)


@pytest.mark.parametrize("factor", [1.0, 0.125, 0.1, 128**-0.5, 0.999, 0.5000001])
def test_queries_are_multiplied_by_powers_of_two(factor: float) -> None:
    spec = AttentionSpec.parse(f"attention(score={factor}*s + load(0, kv - q + 9), aux=[float])")
    unit, of_queries = scaling(spec.score, "Fp16")
    assert unit * of_queries == factor and 1 <= unit < 2
    assert math.frexp(of_queries)[0] == 0.5
    assert distance_term(spec.score) is not None


def test_a_scale_at_which_queries_would_lose_their_digits() -> None:
    score = AttentionSpec.parse("attention(score=0.001*s + load(0, kv - q + 9), aux=[float])").score
    assert scaling(score, "Fp16") == (0.0, 0.0) and scaling(score, "Bf16")[0] > 0
