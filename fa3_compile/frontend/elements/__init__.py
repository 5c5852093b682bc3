"""Element rules, one file a family of operators; importing this package registers them all."""

from fa3_compile.frontend.elements import creation, gather, movement, pointwise

__all__ = ["creation", "gather", "movement", "pointwise"]
