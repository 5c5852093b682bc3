"""The operators that stand in the shadow for what aten has no word for.

STOP     a constant for the gradient, whatever it is made of
UNKNOWN  what a call that is not looked into has written over a value
DROPOUT  a dropout that is not decomposed
"""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("fa3_shadow", "DEF")
LIBRARY.define("stop(Tensor x) -> Tensor")
LIBRARY.define("unknown(Tensor x) -> Tensor")
LIBRARY.define("dropout(Tensor x, float p) -> Tensor")

for _name in ("stop", "unknown", "dropout"):
    LIBRARY.impl(_name, lambda x, *_: x.clone(), "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"fa3_shadow::{_name}", lambda x, *_: torch.empty_like(x), lib=LIBRARY
    )

STOP = torch.ops.fa3_shadow.stop.default
UNKNOWN = torch.ops.fa3_shadow.unknown.default
DROPOUT = torch.ops.fa3_shadow.dropout.default

torch.library.register_vmap(
    "fa3_shadow::stop", lambda info, in_dims, x: (STOP(x), in_dims[0]), lib=LIBRARY
)
