"""A piece of printed source text: its kind, how strongly it binds, and sums of several."""

from __future__ import annotations

from dataclasses import dataclass

# Binding strength of a printed piece; an operand weaker than its operator gets parentheses.
LOW, ADD, MUL, ATOM = range(4)


@dataclass(frozen=True)
class Text:
    """A printed piece."""

    body: str
    kind: str
    strength: int = ATOM
    literal: bool = False

    def at(self, strength: int) -> str:
        """The text as an operand of an operator of that strength."""
        return self.body if self.strength >= strength else f"({self.body})"


def sign_strength(body: str) -> int:
    """How strongly a literal binds."""
    return ADD if body.startswith("-") else ATOM


def negated(x: Text) -> str:
    """Minus x. In Python -a // b and -a % b are (-a) // b and (-a) % b."""
    rounds = x.kind == "int" and ("//" in x.body or "%" in x.body)
    return f"-{x.at(ATOM if rounds else MUL)}"


def sum_of(terms: list[tuple[bool, Text]], kind: str) -> Text:
    """The sum of terms of one kind, of each whether it is taken off and what it is."""
    if len(terms) == 1 and terms[0][1].literal:
        [(negative, x)] = terms
        return Text(f"-{x.body}", kind, ADD, True) if negative else x
    terms = sorted(terms, key=lambda x: x[0])  # a positive term first, where there is one
    body = ""
    for negative, x in terms:
        if body:
            body += f" {'-' if negative else '+'} {x.at(MUL)}"
        else:
            body = negated(x) if negative else x.at(ADD)
    return Text(body, kind, ADD)


def python_mod(a: Text, b: Text) -> str:
    """The sign of the divisor, whichever way the language's `%` rounds."""
    return f"({a.at(MUL)} % {b.at(ATOM)} + {b.at(ADD)}) % {b.at(ATOM)}"
