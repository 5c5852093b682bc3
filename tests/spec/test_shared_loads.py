"""Which captured tensors several keys of a row read in one place."""

from __future__ import annotations

import pytest

from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.shared_loads import keys_share

SHARED = [
    "score=s + load(0, h)",
    "score=s*load(0, b, q)",
    "score=s + load(0, h, max(min(kv - q, 7), -7) + 7)",
    "score=s + load(0, mod(kv, 4), h)",
    "score=s + load(0, floordiv(kv, 8))",
    "score=s + load(0, 2*kv - q)",
    "score=s + load(0, kv) + load(0, q)",
    "score=s, mask=kv <= q - 3, dead=score, fill=load(0, h)",
]
ONE_A_KEY = [
    "score=s + load(0, kv)",
    "score=s + load(0, h, kv - q + 9)",
    "score=s + load(0, q - kv + 9)",
    "score=s + load(0, b, h, q, kv)",
    "score=s, weight=load(0, h)",
    "score=s, sinks=[load(0, h)]",
    "normalize=none, score=sigmoid(s + load(0, h))",
]


@pytest.mark.parametrize("fields", SHARED)
def test_shared(fields: str) -> None:
    spec = AttentionSpec.parse(f"attention({fields}, aux=[float])")
    assert keys_share(spec, [0])
    assert not keys_share(spec, [])


@pytest.mark.parametrize("fields", ONE_A_KEY)
def test_one_a_key(fields: str) -> None:
    assert not keys_share(AttentionSpec.parse(f"attention({fields}, aux=[float])"), [0])


def test_places_that_are_read() -> None:
    fields = "score=s + load(0, load(1, q, kv), h), aux=[float, int]"
    assert keys_share(AttentionSpec.parse(f"attention({fields})"), [0])
