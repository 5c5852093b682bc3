"""Why an attention has no output that could be replaced."""

from __future__ import annotations

import torch

from fa3_compile.errors import Decline
from fa3_compile.frontend.detect.operands import is_movement
from fa3_compile.frontend.detect.skeletons import Skeleton
from fa3_compile.frontend.shadow.trace import Shadow


def not_held(shadow: Shadow, skeleton: Skeleton) -> Decline:
    """The decline where no tensor of the program is the product with V, its elements moved."""
    followers = shadow.users(skeleton.values)
    while len(followers) == 1 and is_movement(followers[0]):
        followers = shadow.users(followers[0])
    if skeleton.output not in shadow.aten_of:
        hint = "Return the attention's output from the mapped function, and do the rest outside."
        message = "the output is changed inside the torch.vmap that the attention is under"
    elif any(x.target is torch.ops.aten.copy.default for x in followers):
        hint = "Use what the product returns."
        message = "the product with V is written into another tensor, by out= or copy_()"
    else:
        hint = "Take the product with V as a whole before it is changed."
        message = "the output is not made of the product with V by views alone"
    return Decline("output-unclear", skeleton.output, hint, message=message)
