"""Whether a BlockMask's lists of blocks say what its mask_mod says.

flex_attention's compiled kernels apply the mask_mod in PARTIAL blocks only: they skip blocks that
no list has, and see all of a FULL one. Its eager code reads the mask_mod alone, and so do we. The
lists that `create_block_mask` makes agree with the mask_mod by construction; lists made otherwise
may be the mask themselves, and then the call is left to PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fa3_compile.errors import Decline
from fa3_compile.frontend.dynamo.graph import example_value
from fa3_compile.frontend.dynamo.mutations import is_mutation
from fa3_compile.frontend.dynamo.sizes import hint

# PyTorch's block size for "no BlockMask at all".
WHOLE = 1 << 30
# How many unlisted and how many FULL blocks are looked at, and how many rows and columns of each.
BLOCKS, POSITIONS = 32, 128
# How many calls lie between an input and a list that is made of it.
STEPS = 12
HINT = "Say what the lists say in mask_mod, or make the BlockMask by create_block_mask."


def check(block_mask: tuple, mask_mod: fx.GraphModule, captures: Sequence[Any]) -> None:
    """`Decline` if the lists are known to differ from the mask_mod, or if nothing is known.

    block_mask   BlockMask.as_tuple() in the graph: lengths, lists of blocks as nodes, block sizes
    """
    q_size, kv_size = block_mask[-3:-1]
    if q_size == kv_size == WHOLE:
        return
    lists = list(block_mask[2:6])
    values = [_value(x) for x in lists]
    captured = [_value(x) if isinstance(x, fx.Node) else x for x in captures]
    known = all(v is not None for v, x in zip((*values, *captured), (*lists, *captures)) if x)
    if known and all(isinstance(n, int) for n in (*block_mask[:2], q_size, kv_size)):
        if differs(block_mask[:2], (q_size, kv_size), values, mask_mod, captured):
            raise Decline(
                "block-lists",
                None,
                HINT,
                message="the BlockMask's lists of blocks hide or show other keys than its mask_mod",
            )
    elif not all(_from_create_block_mask(x) for x in lists if x is not None and _is_computed(x)):
        raise Decline(
            "block-lists",
            None,
            HINT,
            message="the BlockMask's lists of blocks are computed by the program",
        )
    elif _sees_all(mask_mod) and not all(_is_computed(x) for x in lists if x is not None):
        raise Decline(
            "block-lists", None, HINT, message="the BlockMask's lists of blocks are its only mask"
        )


def differs(
    lengths: Sequence[int],
    sizes: Sequence[int],
    lists: Sequence[Tensor | None],
    mask_mod: fx.GraphModule,
    captures: Sequence[Any],
) -> bool:
    """Whether the mask holds somewhere in a sample of unlisted blocks, or fails in a FULL one.

    lists   numbers and indices of the PARTIAL blocks, then those of the FULL ones, if any
    """
    counts, indices, full_counts, full_indices = lists
    assert counts is not None and indices is not None
    with unset_fake_temporarily(), torch.no_grad():
        full = _table(full_counts, full_indices, indices) if full_counts is not None else None
        listed = _table(counts, indices, indices)
        listed = listed if full is None else listed | full
        samples = [(~listed, False)] + ([] if full is None else [(full, True)])
        for blocks, expected in samples:
            # The last column and row of blocks may lie beyond the mask's lengths.
            found = blocks.nonzero()
            for at in found[:: max(1, len(found) // BLOCKS)].tolist():
                seen = _block(at, lengths, sizes, mask_mod, captures, counts.device)
                if seen is not None and bool((seen != expected).any()):
                    return True
    return False


def _table(counts: Tensor, indices: Tensor, like: Tensor) -> Tensor:
    """bool [B,H,blocks of queries,blocks of keys]: which blocks a list has."""
    columns = like.shape[-1]
    taken = torch.arange(columns, device=indices.device) < counts[..., None]
    table = torch.zeros(*indices.shape[:-1], columns + 1, dtype=torch.bool, device=indices.device)
    place = torch.where(taken, indices.long(), columns)
    return table.scatter_(-1, place, True)[..., :columns]


def _block(at, lengths, sizes, mask_mod, captures, device) -> Tensor | None:
    """The mask at evenly spaced places of one block; None if the block is outside the mask."""
    from fa3_compile.frontend.expand.flex import Mod

    places = []
    for block, size, length in zip(at[2:], sizes, lengths):
        begin, end = block * size, min((block + 1) * size, length)
        if begin >= end:
            return None
        steps = min(POSITIONS, end - begin)
        # In integers: a default dtype of 16 bits would round them out of the block.
        step = torch.arange(steps, device=device)
        places.append(begin + step * (end - 1 - begin) // max(1, steps - 1))

    def mask(q, kv):
        b, h = (torch.tensor(x, device=device) for x in at[:2])
        return Mod(mask_mod).run(b, h, q, kv, *captures)

    return torch.vmap(torch.vmap(mask, (None, 0)), (0, None))(*places)


def _value(x: fx.Node | None) -> Tensor | None:
    """What a tensor holds in the call that is being compiled: an input of the compiled function,
    or what is computed of inputs in a few steps, as the rows of blocks that are being decoded."""
    if x is None or x.op == "placeholder":
        return _input(x)
    if _from_create_block_mask(x):
        return None
    try:
        with unset_fake_temporarily(), torch.no_grad():
            value = _computed(x, {}, STEPS)
    except Exception:  # whatever it is, nothing is known of its result
        return None
    return value if isinstance(value, Tensor) and not _is_fake(value) else None


def _computed(x: fx.Node, known: dict[fx.Node, Any], steps: int) -> Any:
    """The value of a node, by running what it is made of: integers, since blocks that are selected
    by scores may be others in the next call."""
    if x in known:
        return known[x]
    if x.op == "placeholder":
        value = _input(x)
        if value is None and isinstance(example_value(x), (int, torch.SymInt)):
            value = hint(example_value(x))
        if value is None:
            raise ValueError(x.op)
    elif steps == 0 or x.op not in ("call_function", "call_method") or is_mutation(x):
        raise ValueError(x.op)
    else:
        args, kwargs = fx.node.map_arg((x.args, x.kwargs), lambda n: _computed(n, known, steps - 1))
        run = getattr(args[0], str(x.target)) if x.op == "call_method" else x.target
        value = run(*args[x.op == "call_method" :], **kwargs)  # pyright: ignore
    if isinstance(value, Tensor) and value.is_floating_point():
        raise ValueError(x.op)
    known[x] = value
    return value


def _input(x: fx.Node | None) -> Tensor | None:
    """What an input of the compiled function holds in the call that is being compiled."""
    argument = x.meta.get("grapharg") if x is not None else None
    try:
        value = argument.example if argument is not None else None
    except (AssertionError, AttributeError):  # erased: nothing is known
        return None
    return value if isinstance(value, Tensor) and not _is_fake(value) else None


def _is_fake(value: Tensor) -> bool:
    return isinstance(value, torch._subclasses.FakeTensor)


def _is_computed(x: fx.Node) -> bool:
    return x.op not in ("placeholder", "get_attr")


def _from_create_block_mask(x: fx.Node) -> bool:
    trace = x.meta.get("stack_trace") or ""
    return "in create_block_mask" in trace and "flex_attention.py" in trace


def _sees_all(mask_mod: fx.GraphModule) -> bool:
    """Whether the mask_mod reads none of its coordinates."""
    return not any(n.users for n in mask_mod.graph.nodes if n.op == "placeholder") or not any(
        n.all_input_nodes and n.op != "output" for n in mask_mod.graph.nodes
    )
