"""Named masks, one conjunct each."""

from __future__ import annotations

from collections.abc import Callable

import sympy
from sympy.logic.boolalg import Boolean

from fa3_compile.spec.expr import COORDINATES, KV, SKV, SQ, B, H, Q, floordiv, load

FORMS: list[Callable[[Boolean], str | None]] = []


def mask_form(recognise: Callable[[Boolean], str | None]):
    """Registers a recogniser of one conjunct: its name, or None."""
    FORMS.append(recognise)
    return recognise


def mask_names(mask: Boolean) -> list[str]:
    """The names of a mask's conjuncts, in reading order."""
    if mask == sympy.true:
        return []
    conjuncts = mask.args if isinstance(mask, sympy.And) else (mask,)
    window = _two_sided(conjuncts)
    names = [window] if window else []
    for conjunct in conjuncts:
        if window and _offset(conjunct) is not None:
            continue
        name = next((n for form in FORMS if (n := form(conjunct))), "custom mask")
        names.append(name)
    return sorted(set(names), key=lambda n: (not n.startswith("causal"), n))


def _offset(atom) -> tuple[str, sympy.Expr] | None:
    """("<=", c) for kv <= q + c, (">=", c) for kv >= q + c."""
    if isinstance(atom, (sympy.Le, sympy.Ge)) and atom.lhs == KV:
        c = atom.rhs - Q
        if c.free_symbols.isdisjoint(COORDINATES) and not c.atoms(load):
            return ("<=" if isinstance(atom, sympy.Le) else ">=", c)
    return None


def _two_sided(conjuncts) -> str | None:
    offsets = [o for o in map(_offset, conjuncts) if o]
    right = next((c for sign, c in offsets if sign == "<="), None)
    left = next((c for sign, c in offsets if sign == ">="), None)
    if len(offsets) == 2 and right is not None and left is not None and right != 0:
        return f"window(left={-left}, right={right})"
    return None


@mask_form
def causal(atom) -> str | None:
    """A query sees the keys up to itself, aligned at the start or at the end (KV cache)."""
    match _offset(atom):
        case ("<=", c) if c == 0:
            return "causal"
        case ("<=", c) if c == SKV - SQ or c.is_Integer:
            return f"causal(offset={c})"
    return None


@mask_form
def window(atom) -> str | None:
    """Sliding window (Mistral): a token sees itself and the tokens before it, `size` in all."""
    match _offset(atom):
        case (">=", c):
            return f"window({1 - c})"
    return None


@mask_form
def prefix(atom) -> str | None:
    """Prefix LM: the first keys are seen by every query, the rest causally."""
    if isinstance(atom, sympy.Or) and sympy.Le(KV, Q) in atom.args and len(atom.args) == 2:
        other = next(x for x in atom.args if x != sympy.Le(KV, Q))
        if isinstance(other, sympy.Le) and other.lhs == KV and Q not in other.free_symbols:
            return "prefix"
    return None


@mask_form
def per_key(atom) -> str | None:
    """Padding: a boolean for each key of each sequence."""
    loads = atom.atoms(load)
    if len(loads) == 1 and {KV} <= atom.free_symbols <= {B, KV}:
        return "per-key mask"
    return None


@mask_form
def per_query(atom) -> str | None:
    """A boolean for each query of each sequence."""
    if len(atom.atoms(load)) == 1 and {Q} <= atom.free_symbols <= {B, Q}:
        return "per-query mask"
    return None


@mask_form
def documents(atom) -> str | None:
    """Packed sequences: a query sees the keys of its own document."""
    if isinstance(atom, sympy.Eq) and all(isinstance(x, load) for x in atom.args):
        a, b = atom.args
        if a.tensor == b.tensor and {Q, KV} <= atom.free_symbols:
            return "documents"
    return None


@mask_form
def chunks(atom) -> str | None:
    """Chunked attention (Llama 4): a query sees the keys of its own chunk."""
    if isinstance(atom, sympy.Eq) and all(isinstance(x, floordiv) for x in atom.args):
        a, b = atom.args
        if {a.args[0], b.args[0]} == {Q, KV} and a.args[1] == b.args[1]:
            return f"chunks({a.args[1]})"
    return None


@mask_form
def dense(atom) -> str | None:
    """A boolean tensor with an element for every query and key."""
    loads = atom.atoms(load)
    if len(loads) == 1 and {Q, KV} <= next(iter(loads)).free_symbols:
        return "dense mask"
    if loads and atom.free_symbols.isdisjoint({Q, KV, H}):
        return "per-sequence mask"
    return None
