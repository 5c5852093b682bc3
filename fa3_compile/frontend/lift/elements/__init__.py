"""Element rules, one file a family of operators; importing this package registers them all."""

from fa3_compile.frontend.lift.elements import (
    arithmetic,
    bits,
    casts,
    creation,
    functions,
    gather,
    logic,
    movement,
    weights,
)

__all__ = [
    "arithmetic",
    "bits",
    "casts",
    "creation",
    "functions",
    "gather",
    "logic",
    "movement",
    "weights",
]
