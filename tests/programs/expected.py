"""What has to become of a random program that writes its attention out."""

from __future__ import annotations

import torch

from tests.programs import after, layouts, softmaxes
from tests.programs.mutants import NO_ATTENTION, OF_ELEMENTS
from tests.programs.program import Expected
from tests.programs.recipe import BESIDE, EXPRESSION, TWO_ATTENTIONS, Recipe


def expected(made: Recipe) -> Expected:
    # The only query does not see the key that is left out.
    unseen = made.sizes.n == 1 and "not own" in made.masks
    if made.mutant in NO_ATTENTION and not (made.mutant in OF_ELEMENTS and made.plain):
        # Squares over their sum are a softmax of twice the scores.
        softmax = made.mutant == "squared weights" and made.after in after.NORMALISES
        return "either" if made.mutant == "a key left out" and unseen or softmax else "left"
    return "either" if made.mutant or _either(made) else "fused"


def _either(made: Recipe) -> bool:
    """Whether a program that is attention may be left as it is."""
    layout, softmax, captured = made.layout, made.softmax, made.captured
    # Only the softmax of the scores themselves, added to at most, is blind to the maximum.
    other = made.modifiers[-1:] != ["CogView"] or made.masks or captured or made.sink
    # Which heads are whose is not known where their numbers are symbols.
    merged = (made.of_scores, made.of_values) != ("operator", "operator")
    if layout in ("fused qkv", "qkv by head"):
        merged = made.use == "flat"
    return any(
        (
            # Batches that only the mask has: K and V are shared by rows of different masks.
            layout == "no batch" and made.by_batch,
            # Expressions may be too long, or of what no kernel computes.
            captured == EXPRESSION,
            # No key is seen at all, or there is but one.
            made.sizes.n == 1 and ("strict" in made.masks or "not own" in made.masks),
            made.sizes.m == 1,
            "CogView" in made.modifiers and (other or made.plain or softmax in softmaxes.WITH_SINK),
            # 0 * -inf is NaN, and fusing would lose that: also what a checkpoint is given may be -inf.
            made.how == "both"
            and made.masks
            and (
                captured in ("padding", "empty sequence", "lengths")
                or (made.hides or made.context == "checkpoint")
                and made.given
            ),
            # Eager does not normalise a row of one finite fill, spelled so.
            softmax in ("logsumexp", "log of the sum") and (made.masks or captured),
            made.context == "autocast",
            # A masked score is no small weight where it is multiplied by a decay, and silu(-inf)
            # is NaN.
            softmax in ("retention", "silu") and (made.masks or made.hides),
            # Conditions of several masks and the score are not told apart.
            softmax == "elu" and ("in place" in made.masks or made.masks and made.hides),
            # Of a row without keys what 0 is added to is known for masks alone.
            softmax == "with zero" and (made.masks or captured or made.sink),
            softmax in softmaxes.OF_MASKS
            and (made.hides or captured in ("infinite bias", "seconds")),
            # A sum of what is left may be as small as what it is kept from.
            softmax == "over a clamped sum",
            # Few queries are not worth a copy of V.
            made.after in after.NORMALISES,
            # Rows that are NaN, and filled in part; a tensor may hold -inf.
            made.after == "filled" and (made.dead or captured),
            # Numbers that cancel, of a tensor that may hold -inf.
            made.given == "number detached"
            and (not made.training or made.after in after.REPLACES_NAN),
            # Nothing is left.
            made.sizes.n == 1 and made.after_masks,
            # Named, and left: a tensor of all queries, keys and numbers of a head.
            layouts.WRITTEN_OUT in (made.of_scores, made.of_values),
            # Keys of a product that are read by steps, or from a place known when it runs.
            made.keys == "every other" or made.keys and made.dynamic,
            # Sums are given for weights that nothing has changed.
            softmax == "relu of its sum" and made.after,
            # A factor between the product and the division is not looked through.
            softmax == "divided late" and made.of_values == "baddbmm",
            made.dynamic and layout.startswith(("fused qkv", "qkv by", "gqa")) and merged,
            # The lengths of K and V are halves of the tensors', not known to be the scores'.
            made.dynamic and layout == "every other key",
            # A function of a masked score may make something else of its fill.
            made.late,
            # Two attentions, or one and another product.
            made.use in TWO_ATTENTIONS or made.use in BESIDE,
            # Weights without a softmax whose NaN are replaced.
            made.plain and made.after in after.REPLACES_NAN,
            # One query's maximum beside an exponential of its own.
            made.sink == "shifted" and softmax == "off by one" and made.sizes.n == 1,
            # A maximum that is taken off before the scores are scaled, to base two.
            made.sink == "shifted" and softmax == "base two" and (made.masks or captured),
            # Numbers of a Python variable, as `math.e` is, are known when it runs: the base, or what
            # a maximum was taken off before.
            made.dynamic and softmax in ("power of e", "power of two"),
            # Rows that are NaN by a mask that is captured, and not filled.
            made.after == "rows asked for keys" and made.masks and made.hides,
            # Fills of several masks, added in float16, may make a row -inf everywhere.
            made.dtype == torch.float16
            and (made.after in after.REPLACES_NAN or softmax in softmaxes.SAFE)
            and made.masks
            and made.hides,
        )
    )
