"""Named score modifiers, one term of the sum each."""

from __future__ import annotations

from collections.abc import Callable

import sympy

from fa3_compile.spec.expr import KV, B, Expr, H, Q, S, load, where
from fa3_compile.spec.fills import OUT_OF_REACH

FORMS: list[Callable[[Expr], str | None]] = []


def score_form(recognise: Callable[[Expr], str | None]):
    """Registers a recogniser of one term: its name, "" for a plain scale, or None."""
    FORMS.append(recognise)
    return recognise


def score_names(score: Expr) -> list[str]:
    """The names of a score's terms, in reading order; a constant scale has none."""
    names = []
    for term in sympy.Add.make_args(score):
        name = next((n for form in FORMS if (n := form(term)) is not None), "custom score")
        if name and name not in names:
            names.append(name)
    return sorted(names, key=lambda n: n.startswith("custom"))


@score_form
def scale(term: Expr) -> str | None:
    """s times a constant."""
    coefficient, rest = term.as_coeff_Mul()
    return "" if rest == S or term.is_number else None


@score_form
def temperature(term: Expr) -> str | None:
    """s times a learned or loaded scale for each head, query or the whole tensor."""
    rest = (term / S).cancel() if S in term.free_symbols else None
    if rest is not None and S not in rest.free_symbols and KV not in rest.free_symbols:
        return "temperature"
    return None


@score_form
def softcap(term: Expr) -> str | None:
    """cap * tanh(scale * s / cap) (Gemma 2)."""
    coefficient, rest = term.as_coeff_Mul()
    if isinstance(rest, sympy.tanh):
        inner, symbol = rest.args[0].as_coeff_Mul()
        if symbol == S and inner.is_number:
            return f"softcap({float(coefficient):g})"
    return None


@score_form
def alibi(term: Expr) -> str | None:
    """A slope for each head times the key's position or its distance (Press et al., 2022).

    Heads are read as b where the batch has one element.
    """
    if S in term.free_symbols or KV not in term.free_symbols or not {H, B} & term.free_symbols:
        return None
    factors = sympy.Mul.make_args(term)
    slopes = [f for f in factors if {H, B} & f.free_symbols and KV not in f.free_symbols]
    places = [f for f in factors if KV in f.free_symbols]
    if len(slopes) == 1 and places:
        return "ALiBi"
    return None


@score_form
def per_head(term: Expr) -> str | None:
    """A constant of the head: softmax does not see it."""
    return "" if term.free_symbols <= {H, B} and S not in term.free_symbols else None


@score_form
def extended_mask(term: Expr) -> str | None:
    """(x - 1) * c of a loaded 0/1 mask x, as BERT extended its padding once."""
    if not isinstance(term, where) or not isinstance(term.args[0], sympy.Eq):
        return None
    condition, at_one, otherwise = term.args
    x = condition.lhs
    slope = otherwise.coeff(x) if isinstance(x, load) else sympy.S.Zero
    if slope == 0 or at_one != 0 or otherwise != slope * x - slope:
        return None
    # Out of reach it is a mask, which has a name of its own.
    return "" if slope >= -OUT_OF_REACH else "bias"


@score_form
def bias(term: Expr) -> str | None:
    """A tensor added to the scores, or a constant times it."""
    coefficient, rest = term.as_coeff_Mul()
    if not isinstance(rest, load):
        return None
    return "bias" if {Q, KV} & rest.free_symbols else ""
