"""A module of a package, and inputs for it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

# What makes (a module or function, its positional arguments, its keyword arguments).
Case = Callable[[], tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]
# Of a tensor of normal numbers.
Shape = tuple[int, ...]


def found(path: str) -> Any:
    """What `path` names: "timm.models.beit:Attention"."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def normal(*shape: int) -> torch.Tensor:
    """An input of normal numbers that requires a gradient."""
    return torch.randn(shape, requires_grad=True)


def block(path: str, *inputs: Any, call: dict[str, Any] | None = None, **fields: Any) -> Case:
    """The class at `path` made of `fields`, and called with `inputs` and `call`: shapes stand for
    normal numbers, and a list is passed as the tuple that it is."""

    def made():
        module = found(path)(**fields)
        args = tuple(map(_input, inputs))
        return module, args, {name: _input(x) for name, x in (call or {}).items()}

    return made


def _input(x: Any) -> Any:
    if isinstance(x, list):
        return tuple(map(_input, x))
    if callable(x):
        return x()
    return normal(*x) if isinstance(x, tuple) else x
