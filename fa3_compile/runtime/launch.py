"""What Inductor's generated code calls in place of the operators, when a kernel runs.

The dispatcher, parsing and choosing cost tens of microseconds a call. These objects do them once
for each layout of their arguments, and then go straight to the kernel's launch. Generated code
makes them from plain text, so that it works in any process that loads it from a cache.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fa3_compile.runtime import op

# (out, LSE) of q, k, v and the captured tensors, for the layouts that it was made for.
Call = Callable[[Tensor, Tensor, Tensor, Sequence[Tensor]], tuple[Tensor, Tensor]]
# The same of (q, k, v, aux, sizes).
General = Callable[..., tuple[Tensor, Tensor]]
# Layouts that one object remembers: a growing KV cache brings a new one with each token.
LARGEST = 256


def layout_key(tensors: Sequence[Tensor], sizes: Sequence[int]) -> tuple:
    """What a kernel is bound to beside its spec: all but the tensors' contents and addresses, of
    which it may know that V, the third, begins where K does."""
    key: list = [*sizes, tensors[1].data_ptr() == tensors[2].data_ptr()]
    for x in tensors:
        key += (x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() & 15)
    return tuple(key)


def make_room(cache: dict, largest: int) -> None:
    """Drops the older half of a full cache."""
    if len(cache) >= largest:
        for key in list(cache)[: largest // 2]:
            cache.pop(key, None)


class Attention:
    """`fa3::attention` of one spec text.

    fixed  every call has the sizes, strides, dtypes and device of the first one; only the
           alignment of addresses is looked at then
    lse    whether the LSE is used; otherwise None may come in its place
    call   (q, k, v, aux, sizes) -> (out [B,H,Sq,Dv], lse [B,H,Sq]) as the operator gives them; it
           may be given a list as well, the same one in calls with the same `aux`, empty at first,
           in which they leave each other what depends on `aux` alone
    """

    def __init__(self, text: str, fixed: bool = False, lse: bool = True) -> None:
        self.text, self.fixed, self.lse = text, fixed, lse
        self.call: General = self._found_again
        self._calls: dict[tuple, Call] = {}

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, aux: Sequence[Tensor], sizes: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        return self.call(q, k, v, aux, sizes)

    def _found_again(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        aux: Sequence[Tensor],
        sizes: Sequence[int],
        shared: list | None = None,
    ) -> tuple[Tensor, Tensor]:
        tensors = (q, k, v, *aux)
        key = layout_key(tensors, sizes)
        call = self._calls.get(key)
        if call is None:
            call = self._bind(q, k, v, aux, sizes)
            make_room(self._calls, LARGEST)
            self._calls[key] = call
            # Made from (otherwise, lse): of no argument anything but the address is looked at.
            fixed = getattr(call, "fixed", None)
            aligned = not any(x.data_ptr() & 15 for x in tensors)
            # The first stays: layers hand lists of KV blocks on to who has the same `call`, and
            # those of another layout have tiles of other sizes.
            if self.fixed and aligned and fixed is not None and self.call == self._found_again:
                self.call = fixed(self._found_again, self.lse)
        return call(q, k, v, aux)

    def _bind(self, q, k, v, aux, sizes) -> Call:
        bound = importlib.import_module("fa3_compile.lower.dispatch").bound
        return bound(self.text, q, k, v, aux, sizes, self.lse) or self._operator(sizes)

    def _operator(self, sizes: Sequence[int]) -> Call:
        def call(q, k, v, aux):
            return torch.ops.fa3.attention.default(q, k, v, aux, sizes, self.text)

        return call


class AttentionBackward:
    """`fa3::attention_backward` of one spec text; `needs` as the operator has it."""

    def __init__(self, text: str, needs: Sequence[bool], fixed: bool = False) -> None:
        self.text, self.needs, self.fixed = text, list(needs), fixed
        self._calls: dict[tuple, Callable] = {}

    def __call__(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        aux: Sequence[Tensor],
        sizes: Sequence[int],
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """(dq, dk, dv, daux) as the operator gives them."""
        key = () if self.fixed else layout_key((q, k, v, *aux), ())
        call = self._calls.get(key)
        if call is None:
            bound = importlib.import_module("fa3_compile.lower.dispatch").bound_backward
            call = bound(self.text, q, k, v, aux, self.needs)
            make_room(self._calls, LARGEST)
            self._calls[key] = call
        grads = call(op.BackwardInputs(dout, dlse, q, k, v, out, lse, aux, sizes, self.needs))
        return op.gradients_as_declared((q, k, v, *aux), grads)
