"""The distinct texts of `eager_attention_forward` in the installed transformers."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import transformers
from transformers.models.auto.configuration_auto import model_type_to_module_name

from tests.models.architecture import Architecture

FUNCTION = re.compile(
    r"^def \w*eager_attention_forward\(.*?(?=^[^\s)]|\Z)", re.DOTALL | re.MULTILINE
)


def eager_bodies() -> dict[str, set[str]]:
    """Body, without comments and docstring, to the modules ("llama") that have it."""
    found: dict[str, set[str]] = {}
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for text in FUNCTION.findall(path.read_text()):
            function = ast.parse(text).body[0]
            assert isinstance(function, ast.FunctionDef)
            body = "\n".join(ast.unparse(x) for x in function.body if not _is_docstring(x))
            found.setdefault(body, set()).add(path.parent.name)
    return found


def module_of(architecture: Architecture) -> str:
    """The module under transformers.models that defines it."""
    if architecture.model_class:
        return architecture.model_class.split(".")[0]
    return model_type_to_module_name(architecture.name)


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
