"""Inductor's node for an attention that a kernel computes: in Python, a call of `runtime.launch`.

A module of its own because importing it imports Inductor.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.virtualized import V

from fa3_compile.runtime.op import split_text
from fa3_compile.spec import expr as E

ATTENTION = torch.ops.fa3.attention.default
IMPORT = "from fa3_compile.runtime import launch as fa3_launch"
# Of each wrapper that is being written: what makes an object -> its name in the module.
_names: weakref.WeakKeyDictionary[Any, dict[tuple, str]] = weakref.WeakKeyDictionary()
# Of each graph how many calls may share lists.
_alike: weakref.WeakKeyDictionary[Any, Counter[tuple | None]] = weakref.WeakKeyDictionary()
# The same as _names of the variables for lists of blocks that calls share.
_lists: weakref.WeakKeyDictionary[Any, dict[tuple, str]] = weakref.WeakKeyDictionary()


class DirectCall(ir.FallbackKernel):
    """The operator's call, except that Python code calls an object made from its spec text.

    The C++ wrapper, which cannot, calls the operator.
    """

    _lists = ""

    def codegen(self, wrapper) -> None:
        if not V.graph.cpp_wrapper:
            name = self._object(_root(wrapper))
            self.python_kernel_name = f"{name}.call" if self.op_overload is ATTENTION else name
            self._lists = self._shared_lists(wrapper)
        super().codegen(wrapper)

    def codegen_args(self) -> list[str]:
        arguments = super().codegen_args()
        if V.graph.cpp_wrapper:
            return arguments
        return arguments[: -len(self._plain())] + ([self._lists] if self._lists else [])

    def _shared_lists(self, wrapper) -> str:
        """The variable in which calls with the same captured tensors leave their lists of blocks;
        "" for a call that is alone with them."""
        if V.graph not in _alike:
            calls = (x for x in V.graph.operations if isinstance(x, DirectCall))
            _alike[V.graph] = Counter(x._called() for x in calls)
        called = self._called()
        if called is None or _alike[V.graph][called] < 2:
            return ""
        # Bodies of a conditional are graphs of their own.
        known = _lists.setdefault(wrapper, {})
        key = (id(V.graph), called)
        if key not in known:
            known[key] = f"fa3_lists_{wrapper.next_kernel_suffix()}"
            wrapper.writeline(f"{known[key]} = []")
        return known[key]

    def _called(self) -> tuple | None:
        """What calls have in common that may share lists; None where nothing can be shared."""
        if self.op_overload is not ATTENTION or not self._fixed():
            return None
        captured = self.inputs[3:]
        names = [x.get_name() for x in captured]
        if any(x in V.graph.mutated_buffers for x in names):
            return None
        if not E.loads_in(split_text(self._plain()[0])[0].mask):
            return None
        places = [x.get_layout().offset for x in captured]
        return self._plain(), self._layouts(), self._sizes(), *names, *places

    def _plain(self) -> tuple[Any, ...]:
        """The operator's last arguments, which are data: the text; the gradients needed."""
        arguments, _ = self.unflatten_args(self.inputs, self.constant_args)
        return tuple(arguments[5:] if self.op_overload is ATTENTION else arguments[9:])

    def _object(self, wrapper) -> str:
        """The name of the object in the generated module; one for all calls of a layout."""
        forward = self.op_overload is ATTENTION
        layout, fixed = self._layouts(), self._fixed()
        plain = self._plain()
        made = f"{'Attention' if forward else 'AttentionBackward'}({', '.join(map(repr, plain))}"
        made += f", fixed={fixed}"
        made += ")" if not forward or self._is_used(1) else ", lse=False)"
        known = _names.setdefault(wrapper, {})
        # What is not fixed finds its layout anew in each call.
        key = (made, layout, self._sizes()) if fixed else (made,)
        if key not in known:
            known[key] = f"fa3_attention_{wrapper.next_kernel_suffix()}"
            wrapper.add_import_once(IMPORT)
            wrapper.header.writeline(f"{known[key]} = fa3_launch.{made}")
        return known[key]

    def _layouts(self) -> tuple:
        return tuple(_layout(x) for x in self.inputs)

    def _fixed(self) -> bool:
        """Whether all sizes and strides are known now."""
        return all(_is_number(n) for n in _leaves((self._layouts(), self._sizes())))

    def _is_used(self, output: int) -> bool:
        """Whether anything reads this output of the operator."""
        name = self.outputs[output].get_name()
        return name not in V.graph.removed_buffers

    def _sizes(self) -> tuple:
        arguments, _ = self.unflatten_args(self.inputs, self.constant_args)
        return tuple(arguments[4] if self.op_overload is ATTENTION else arguments[8])


def _root(wrapper):
    """The wrapper whose imports and header the module gets."""
    return wrapper.get_root_graph() if hasattr(wrapper, "get_root_graph") else wrapper


def _layout(x: ir.IRNode) -> tuple:
    return tuple(x.get_size()), tuple(x.get_stride()), x.get_dtype(), x.get_device()


def _is_number(n: Any) -> bool:
    return not isinstance(n, sympy.Expr) or n.is_Integer


def _leaves(nested: Any) -> Iterable[Any]:
    for x in nested:
        if isinstance(x, tuple):
            yield from _leaves(x)
        else:
            yield x
