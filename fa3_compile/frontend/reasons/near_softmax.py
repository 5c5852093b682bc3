"""Why what looks like a softmax over the keys is none, as a reader would say it."""

from __future__ import annotations

import sympy
from torch import fx

from fa3_compile.errors import Decline
from fa3_compile.frontend.lift.placeholders import row_stat
from fa3_compile.spec.expr import KV, Expr, depends_on
from fa3_compile.spec.fills import floored

BLOCK_BY_BLOCK = "Write one softmax over all keys: its kernel goes through them block by block."


def another_axis(
    at: fx.Node, *, reordered: bool, several: bool, adds_up: bool, mixes: bool
) -> Decline:
    """The decline of a softmax over another axis than the one that the product after it contracts.

    reordered  whether it is that axis, but for the order of the keys
    several    whether it runs over the contracted axis as well
    adds_up    whether the product contracts another axis as well
    mixes      whether that product's result is itself a tensor of weights
    """
    if reordered:
        return Decline(
            "softmax-axis",
            at,
            "Put the keys and V in one order before both products.",
            message="the weights' keys are put in another order before they meet V, as by flip or "
            "roll",
        )
    if adds_up:
        return Decline(
            "softmax-axis",
            at,
            "Weigh V by each head's own weights, and add up the results.",
            message="the product with V adds up several axes of the weights, and the softmax runs "
            "over one",
        )
    if several:
        return Decline(
            "softmax-axis",
            at,
            "Flatten keys and values to one axis before both products.",
            message="the softmax runs over several axes at once, which are not V's axis of keys",
        )
    if mixes:
        return Decline(
            "softmax-axis",
            at,
            "Weigh V by each head's own weights.",
            message="the weights of several heads or rows are mixed before they weigh V",
        )
    return Decline(
        "softmax-axis",
        at,
        "The softmax has to run over the keys, the axis contracted with V.",
        message="the softmax runs over another axis than the product with V",
    )


def split_by_a_size(at: fx.Node) -> Decline:
    """The decline of heads that are an axis split by what is known only when it runs."""
    return Decline(
        "axes-unclear",
        at,
        "Keep the number of channels fixed: torch._dynamo.mark_static(x, -1), or a head dimension "
        "that is a number.",
        message="heads are channels divided by a dynamic size, so that the axes of the product "
        "with V cannot be told apart",
    )


def of_its_row(score: Expr, at: fx.Node) -> Decline:
    """The decline of a score that has a maximum or a logsumexp in it."""
    if any(x.has(row_stat) for kind in (sympy.Max, floored) for x in score.atoms(kind)):
        return Decline(
            "row-statistic",
            at,
            BLOCK_BY_BLOCK,
            message="a running maximum is taken off, as in a softmax over blocks of keys",
        )
    if isinstance(score, sympy.exp) and not isinstance(score.args[0], row_stat):
        return Decline(
            "row-statistic",
            at,
            BLOCK_BY_BLOCK,
            message="exponentials less their row's maximum are not divided by their sum, as in a "
            "softmax over blocks of keys",
        )
    return Decline(
        "row-statistic",
        at,
        "A maximum or a logsumexp may only be subtracted from its own row.",
        message=f"a score depends on its whole row: {score}",
    )


def check_rows(divided: Expr, at: fx.Node) -> None:
    """`Decline` where what is divided by its sum over the keys has a softmax over another axis."""
    if any(depends_on(x, [KV]) for x in divided.atoms(row_stat)):
        raise Decline(
            "softmax-axis",
            at,
            "The softmax has to run over the keys, the axis contracted with V.",
            message="the softmax runs over another axis than the product with V: over the keys, "
            "weights are only divided by their sum",
        )


def not_exponential(element: Expr, at: fx.Node) -> Decline:
    """The decline of something that is divided by its sum, and has no logarithm."""
    if isinstance(element, sympy.Add) and element.has(row_stat):
        return Decline(
            "sum-of-softmaxes",
            at,
            "Weigh V by each alone and add the results, a * (p @ v) + b * (w @ v); where a + b is "
            "1, nothing has to be divided.",
            message="a softmax and other weights are added up, and divided by their sum",
        )
    return Decline(
        "not-exponential",
        at,
        "Mask and scale the scores before the exponential.",
        message=f"what is divided by its sum has a factor that is no exponential: {element}",
    )
