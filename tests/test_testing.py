"""assert_matches_eager: its oracle is float64 throughout, and what is wrong is told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fa3_compile.testing import assert_matches_eager


def weights(x: Tensor) -> Tensor:
    return torch.softmax(x @ x.mT, -1, dtype=torch.float32).to(x.dtype) @ x


def in_a_checkpoint(x: Tensor) -> Tensor:
    return checkpoint(weights, x, use_reentrant=False)


def as_it_is(gm: torch.fx.GraphModule, _):
    return gm


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_oracle_computes_a_checkpoint_again_in_float64(dtype):
    x = torch.randn(2, 5, 4, requires_grad=True)
    assert_matches_eager(in_a_checkpoint, x, backend=as_it_is, training=True, dtype=dtype)


def test_a_wrong_gradient_in_a_checkpoint_is_told():
    def held_constant(gm: torch.fx.GraphModule, _):
        return lambda *args: [gm(*args)[0].detach() + 0 * args[0]]

    x = torch.randn(2, 5, 4, requires_grad=True)
    with pytest.raises(AssertionError, match="gradient of input 0"):
        assert_matches_eager(in_a_checkpoint, x, backend=held_constant, training=True)
