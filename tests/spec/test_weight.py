"""The weight of a spec: its text, its random numbers, and what they are made of."""

import pytest
import sympy
import torch

from fa3_compile.lower.printers.philox import philox, uniform
from fa3_compile.spec import expr as E
from fa3_compile.spec.attention import AttentionSpec
from fa3_compile.spec.derivative import derivative
from fa3_compile.spec.forms import dropout_weight, name_of
from fa3_compile.spec.text import parse, text

SEED = E.load(0, 0)
WORD = 2**32 - 1


def slow_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as the paper writes it, in Python's integers."""
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            second >> 32 ^ counter[1] ^ key[0],
            second & WORD,
            first >> 32 ^ counter[3] ^ key[1],
            first & WORD,
        ]
        key = [(key[0] + 0x9E3779B9) & WORD, (key[1] + 0xBB67AE85) & WORD]
    return counter


# Random123 1.14.0, tests/kat_vectors: counter, key, expected.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([WORD] * 4, [WORD] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    assert slow_philox(counter, key) == expected
    words = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [int(x) for x in words] == expected


@pytest.mark.parametrize("seed", [0, 2**31, 2**40 + 77, -1, 2**63 - 1, -(2**63)])
def test_uniform_is_the_upper_bits_of_a_word(seed):
    b, h, q = torch.arange(2).view(2, 1, 1, 1), torch.arange(3).view(3, 1, 1), torch.tensor([[9]])
    kv = torch.tensor([0, 1, 2, 3, 4, 2**31 - 1])
    found = uniform(torch.tensor([seed]), b, h, q, kv)
    assert found.shape == (2, 3, 1, 6) and found.dtype == torch.float32
    key = [seed & WORD, seed >> 32 & WORD]
    for at in range(2 * 3 * 6):
        i, j, n = at // 18, at // 6 % 3, at % 6
        word = slow_philox([int(kv[n]) // 4, 9, j, i], list(key))[int(kv[n]) % 4]
        assert found[i, j, 0, n].item() == (word >> 8) / 2**24


def test_keep_rate():
    b, h, q, kv = (torch.arange(n) for n in (2, 3, 700, 700))
    seed = torch.tensor([20260801])
    u = uniform(seed, b.view(-1, 1, 1, 1), h.view(-1, 1, 1), q.view(-1, 1), kv)
    for p in (0.1, 0.5):
        kept = (u >= p).double()
        sigma = (p * (1 - p) / kept.numel()) ** 0.5
        assert kept.numel() > 2 * 10**6 and abs(kept.mean() - (1 - p)) < 4 * sigma
        # Neighbours along each axis are independent.
        for axis in range(4):
            left, right = kept.narrow(axis, 0, 1), kept.narrow(axis, 1, 1)
            both = (left * right).mean() - left.mean() * right.mean()
            assert abs(both) < 5 * p * (1 - p) / left.numel() ** 0.5


def test_text_round_trips():
    weight = dropout_weight(SEED, 0.1)
    spec = AttentionSpec(weight=weight, aux=("int",))
    assert str(spec) == (
        "attention(score=s, weight=where(uniform(load(0, 0), b, h, q, kv) < 0.10000002384185791,"
        " 0, 1.1111111111111112), aux=[int])"
    )
    assert AttentionSpec.parse(str(spec)) == spec
    assert name_of(spec) == "dropout(0.1)"
    assert parse(text(weight)) == weight


def test_no_dropout_is_no_weight():
    assert AttentionSpec(weight=dropout_weight(SEED, 0.0), aux=("int",)) == AttentionSpec(
        aux=("int",)
    )
    assert dropout_weight(SEED, 1.0) == 0


@pytest.mark.parametrize("p", [0.1, 0.9, 1 / 3, 0.999])
def test_p_is_a_step_that_float32_holds(p):
    limit = float(dropout_weight(SEED, p).args[0].rhs)
    assert limit == torch.tensor(limit, dtype=torch.float32).item() and 0 <= limit - p < 2**-24


def test_a_weight_of_the_score_is_refused():
    with pytest.raises(ValueError, match="may not depend on s"):
        AttentionSpec(weight=E.S)
    with pytest.raises(ValueError, match="beyond the 0"):
        AttentionSpec(weight=dropout_weight(SEED, 0.1))


def test_random_numbers_have_no_slope():
    bias = E.load(1, E.H)
    factor = E.uniform(SEED, E.B, E.H, E.Q, E.KV)
    assert derivative(factor * bias, bias) == factor
    assert derivative(factor, SEED) == 0
    assert (factor < 0) == sympy.false
