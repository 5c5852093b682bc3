"""The attention class of every module of vit-pytorch, made by the names of its arguments."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

import torch
import vit_pytorch  # pyright: ignore[reportMissingImports]

from benchmarks.coverage.package_case import Case, block

FIELDS: dict[str, Any] = {
    "dim": 32,
    "heads": 4,
    "num_heads": 4,
    "dim_head": 8,
    "dim_key": 8,
    "dim_value": 8,
    "h_s": 4,
    "w_s": 4,
    "window_size": 2,
    "fmap_size": 4,
    "patch_size": 2,
    "k": 2,
    "proj_kernel": 3,
    "kv_proj_stride": 2,
    "attn_type": "short",
    "reduction_factor": 2,
    "num_slots": 3,
    "mlp_dim": 32,
}
TOKENS, IMAGE = (2, 16, 32), (2, 32, 4, 4)
# The inputs of the classes that take others than TOKENS.
INPUTS: dict[str, tuple[Any, ...]] = {
    "attn_residual_with_dca_simple_vit.Attention": (TOKENS, TOKENS, TOKENS),
    **dict.fromkeys(
        """crossformer.Attention cvt.Attention levit.Attention nest.Attention
        twins_svt.LocalAttention twins_svt.GlobalAttention scalable_vit.ScalableSelfAttention
        scalable_vit.InteractiveWindowedSelfAttention""".split(),
        (IMAGE,),
    ),
    **dict.fromkeys(["max_vit.Attention"], ((2, 2, 2, 2, 2, 32),)),
    **dict.fromkeys(["max_vit_with_registers.Attention"], ((8, 5, 32),)),
    "mobile_vit.Attention": ((2, 4, 16, 32),),
    "rvt.Attention": ((2, 17, 32), [(1, 16, 8), (1, 16, 8)], {"h": 4, "w": 4}),
    "vat.Attention": (TOKENS,),
    "simple_vit_with_relative_proj_pos_bias.Attention": ((2, 4, 4, 32),),
    "wwt.MutualAttention": (TOKENS, (2, 3, 32), lambda: torch.ones(16, 3, dtype=torch.bool)),
}

CALLS: dict[str, dict[str, Any]] = {
    "ats_vit.Attention": {"mask": lambda: torch.ones(2, 16, dtype=torch.bool)},
}


def _classes() -> dict[str, type]:
    found: dict[str, type] = {}
    for info in pkgutil.iter_modules(vit_pytorch.__path__):
        try:
            module = importlib.import_module(f"vit_pytorch.{info.name}")
        except ImportError:
            continue  # of packages for audio
        for name, made in inspect.getmembers(module, inspect.isclass):
            if made.__module__ == module.__name__ and name.endswith("Attention"):
                found[f"{info.name}.{name}"] = made
    return found


def _case(name: str, made: type) -> Case:
    asked = inspect.signature(made).parameters
    fields = {x: FIELDS[x] for x in asked if x in FIELDS}
    path = f"{made.__module__}:{made.__name__}"
    return block(path, *INPUTS.get(name, (TOKENS,)), call=CALLS.get(name), **fields)


CASES: dict[str, Case] = {name: _case(name, made) for name, made in _classes().items()}
