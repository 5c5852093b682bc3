"""FlashAttention-3 class kernels for attention written in plain PyTorch.

Nothing has to be imported to use it: `torch.compile(model, backend="fa3")` finds the backend by
its entry point. This module holds what one imports to look at the result. What is behind each name
is loaded on first use, so that `import fa3_compile` costs nothing and never imports Triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fa3_compile.explaining import explain
    from fa3_compile.report import Report, collect

__version__ = "0.1.0"
__all__ = ["Report", "__version__", "collect", "explain", "list_kernels"]

_HOME = {
    "Report": "fa3_compile.report",
    "collect": "fa3_compile.report",
    "explain": "fa3_compile.explaining",
}


def list_kernels() -> list[str]:
    """The kernel families that `options={"kernels": ...}` may name, in the order of preference."""
    from fa3_compile.lower.choose import kernels

    return [kernel.name for kernel in kernels()]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
