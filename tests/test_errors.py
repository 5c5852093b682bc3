"""Errors and declines say what happened, where, and what to do."""

import pytest
import torch

from fa3_compile.errors import Decline, Fa3Error, InternalError, nearest


def test_an_error_is_three_lines():
    error = Fa3Error("it broke", where="graph 0/0", todo="mend it")
    assert str(error) == "it broke\n  where: graph 0/0\n  to do: mend it"


def test_an_internal_error_asks_for_a_report_and_offers_a_way_on():
    text = str(InternalError("KeyError: 3", where="graph 0/0"))
    assert "please report it" in text and "'strict': False" in text
    assert isinstance(InternalError("", where=""), RuntimeError)


def test_a_decline_says_its_code_in_words_unless_it_has_better_ones():
    node = torch.fx.Graph().placeholder("weights")
    decline = Decline("weights-used", node, "do not return them")
    assert (decline.code, decline.node, decline.stage) == ("weights-used", node, "")
    assert str(decline) == "weights used at weights (do not return them)"
    assert str(Decline("dtype", message="float64 has no kernel")) == "float64 has no kernel"


@pytest.mark.parametrize(
    "name, expected", [("strct", "strict"), ("STRICT", "strict"), ("zzz", None)]
)
def test_nearest(name, expected):
    assert nearest(name, ["strict", "fuel"]) == expected
