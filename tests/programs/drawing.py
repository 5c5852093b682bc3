"""Parts of a random program that writes its attention out, drawn, and changed where they do not go
together or eager could not run them."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.programs import after, given, layouts, parts, softmaxes
from tests.programs.choices import Choices
from tests.programs.expected import expected
from tests.programs.expressions import Expression, expression
from tests.programs.masks import MASKS
from tests.programs.mutants import MORE_THAN_ATTENTION, NO_ATTENTION
from tests.programs.parts import Sizes
from tests.programs.program import Expected
from tests.programs.recipe import (
    BESIDE,
    EXPRESSION,
    GIVEN,
    K_WRITTEN,
    OF_LSE,
    OTHER_BATCHES,
    STATIC,
    TWO_ATTENTIONS,
    USES,
    Recipe,
)


def drawn(choices: Choices, device: str) -> tuple[Recipe, Expected]:
    """Parts that go together, and what has to become of a program of them."""
    made = _parts(choices, device)
    _keep_finite(made)
    _keep_apart(made)
    _run_as_eager_can(made)
    wanted = expected(made)
    # One query of several heads that share a key is as good as several queries.
    # A checkpoint draws again where no AOTAutograd makes its random numbers functional.
    others = made.layout in OTHER_BATCHES or made.sizes.n == 1 or made.context == "checkpoint"
    if made.after == "dropout" and (wanted != "fused" or others):
        made.after = ""  # it would draw other numbers
    return made, wanted


def _parts(choices: Choices, device: str) -> Recipe:
    one_of = choices.one_of
    layout = one_of("layout", *layouts.LAYOUTS)
    sizes = parts.sizes(choices, device, square=layout in layouts.SQUARE)
    # Arguments are evaluated in this order, which a seed's programs depend on.
    return Recipe(
        layout=layout,
        sizes=sizes,
        other=_other(sizes, layout) if one_of("second call", *[False] * 7, True) else None,
        of_scores=one_of("scores", "operator", "operator", *layouts.PRODUCTS),
        of_values=one_of("values", "operator", "operator", *layouts.PRODUCTS),
        keys=one_of("keys", *[""] * 9, *parts.SLICES),
        masks=choices.up_to_two("masks", sorted(MASKS)),
        how=one_of("how", *parts.HOWS),
        fill=one_of("fill", *parts.FILLS),
        combine=one_of("combine", "and", "or", "twice"),
        modifiers=choices.up_to_two("modifiers", sorted(parts.MODIFIERS), unique=True),
        captured=(captured := _captured(choices)),
        expression=_expression(choices, sizes) if captured == EXPRESSION else None,
        scale=one_of("scale", *parts.SCALES),
        softmax=one_of("softmax", "divided late", *softmaxes.ALL),
        late=one_of("late", *[""] * 20, *parts.LATE),
        sink=one_of("sink", "", "", "", "", *softmaxes.SINKS),
        after=one_of("after", *after.AFTER),
        after_masks=choices.up_to_two("masks after", sorted(MASKS)),
        use=one_of("use", "", "", *USES),
        context=one_of("context", *[""] * 9, "checkpoint", "autocast", "graph break"),
        # Not float64: the oracle is eager itself there, to the last rounding.
        dtype=one_of(
            "dtype", *[None] * (3 if device == "cpu" else 1), torch.bfloat16, torch.float16
        ),
        mutant=one_of("mutant", *[""] * 24, *NO_ATTENTION, *MORE_THAN_ATTENTION),
        seed=one_of("seed", *range(4)),
        dynamic=one_of("dynamic", None, None, None, True) if layout not in STATIC else None,
        training=one_of("training", True, True, False),
        kernels=one_of("kernels", ("reference",), ("cpu", "reference")),
        numbers=one_of("numbers", *[""] * 8, *parts.NUMBERS),
        frozen=one_of("frozen", *[""] * 4, "Q", "Q, K and V"),
    )


def _other(sizes: Sizes, layout: str) -> Sizes | None:
    """Sizes for a second call. One query stays one query."""
    if layout in STATIC or sizes.m == 1:
        return None
    n = sizes.n + 3 if sizes.n > 1 else 1
    return replace(sizes, n=n, m=sizes.m + 3)


def _captured(choices: Choices) -> str:
    name = choices.one_of("captured", *parts.CAPTURED, *[EXPRESSION] * 6, *[GIVEN] * 8)
    return choices.one_of(GIVEN, *given.names()) if name == GIVEN else name


def _expression(choices: Choices, sizes: parts.Sizes) -> Expression:
    number = choices.one_of(EXPRESSION, *range(1_000_000))
    return expression(number, sizes.n, sizes.m, sizes.device)


def _keep_finite(made: Recipe) -> None:
    """Parts in which eager overflows, or rounds everything off, are replaced."""
    grows = made.grows
    half = made.dtype is not None
    if made.how in parts.NEEDS_FINITE and made.fill == "-inf":
        made.fill = "finfo.min"  # 0 * -inf is NaN in eager, everywhere
    if made.how == "both" and (made.captured == "infinite bias" or made.given in given.INFINITE):
        made.how = "where"  # the same
    if made.plain and made.mutant == "renormalised weights":
        alike = made.numbers in ("K of zeros", "equal keys", "Q of one row of zeros")
        rounds = half or made.context == "autocast"
        if rounds or alike or made.given or made.captured in ("int32 ids", "slopes", EXPRESSION):
            made.mutant = ""  # 0 / 0, where all weights of a row vanish; two sums that cancel
    if made.softmax == "unshifted" and (half or made.on_gpu and grows):
        made.softmax = "by hand"  # exp overflows
    exponential = made.softmax in softmaxes.NEEDS_KEYS or made.softmax in softmaxes.OF_MASKS
    exponential = exponential or made.plain
    if made.scale == "sharp" and (grows or exponential):
        made.scale = "after"  # powers and exponentials overflow
    if made.plain and made.after in after.NORMALISES:
        made.after = ""  # 0 / 0, where all weights of a row vanish
    if made.scale == "sharp" and made.after and half:
        made.scale = "after"  # all weight on one key: docs/numerics.md
    if grows and half and made.after not in (*after.REPLACES_NAN, *after.FILLS):
        made.after = ""  # the same
    if made.on_gpu and half and made.numbers == "V off zero":
        made.numbers = ""  # dQ is the difference of large numbers: docs/numerics.md
    if made.use in BESIDE or made.after in after.NORMALISES:
        if made.numbers in ("V off zero", "K off zero", "equal keys"):
            made.numbers = ""  # two products, each rounded for itself: docs/numerics.md
    if made.use == "function beside" and (half or grows or made.scale == "sharp"):
        made.use = "number beside"  # large beside the softmax
    if made.softmax == "elu" and made.fill == "-100":
        made.fill = "-1e4"  # exp(-100) has no digits in float32, and may be all that a row has
    if made.scale == "none" and (made.sizes.dim > 8 or grows):
        # Scores beyond what a softmax without a maximum takes, and of which float32 rounds much off.
        made.scale = "after"


def _keep_apart(made: Recipe) -> None:
    """Of parts that do not go together one is left out."""
    if made.softmax == "divided late" and (made.mutant or made.sink):
        made.softmax = "by hand"
    if made.softmax in softmaxes.OF_MASKS and (
        not made.masks or made.sink or made.mutant == "softmax over queries"
    ):
        made.softmax = "by hand"
    if made.after not in after.OF_MASKS:
        made.after_masks = []
    if made.mutant or made.after in after.OF_KEYS or made.sizes.m < 4:
        made.keys = ""
    odd = made.plain or made.sink or made.mutant or made.softmax in softmaxes.WITH_SINK
    if made.use in OF_LSE and odd:
        made.use = ""
    if made.use in BESIDE and (odd or made.softmax == "divided late" or made.after == "dropout"):
        made.use = ""
    if made.use == "difference" and (odd or made.softmax == "divided late"):
        made.use = ""
    if made.plain or made.mutant == "softmax over queries":
        made.sink = ""
    if made.use in ("beside a call", "shared scores") and made.mutant in NO_ATTENTION:
        made.use = ""
    # Kernels of PyTorch 2.11 for GPUs refuse a transposed K of length 1 ("key is not correctly
    # aligned (strideM)"), and fail with a misaligned address, which ends the process, on a K that
    # begins within 16 bytes.
    refused = made.layout == "strided" or made.layout == "K transposed" and made.sizes.m == 1
    if made.use == "beside a call" and made.on_gpu and refused:
        made.use = ""
    if made.use in TWO_ATTENTIONS and made.after == "dropout":
        made.after = ""
    if made.mutant == "mean of heads" and made.layout == "mqa":
        made.mutant = ""
    if made.layout == "mqa" and made.of_scores in layouts.BATCHED:
        made.of_scores = "operator"
    if made.layout == "no batch" and made.expression and made.how in parts.IN_PLACE:
        made.how = "where"  # the mask may have more axes than the scores
    broadcast = made.layout == "mqa" or made.layout == "no batch" and made.by_batch
    if made.of_values in layouts.BATCHED and (broadcast or made.mutant == "mean of heads"):
        made.of_values = "operator"
    if made.context == "autocast" and made.dtype is not None:
        made.context = ""
    if made.context == "checkpoint" and made.mutant == K_WRITTEN:
        made.context = ""


def _run_as_eager_can(made: Recipe) -> None:
    """Where eager's numbers are others by its roundings or its NaN, parts and the run change."""
    added = made.how == "product" or made.how.startswith("added")
    changed = made.combine == "twice" or made.late or made.plain
    several = made.masks and (changed or made.expression or made.given)
    absorbed = made.adds_lowest or several and added
    if made.dtype == torch.float16 and absorbed:
        # In float16 eager's -65504 absorbs a score, and twice that is -inf; ours is in float32.
        made.dtype = torch.bfloat16
    dead = made.dead
    twice = made.combine == "twice" or made.adds_lowest
    infinite = made.fill == "-inf" or made.fill == "finfo.min" and made.masks and twice
    additive = made.how == "logarithm" or added and infinite
    additive = additive or made.plain and made.mutant == "renormalised weights"
    additive = additive or made.after in after.NORMALISES
    if made.use in OF_LSE and dead:
        made.use = ""  # of a row of fills eager's gradient is that of no logarithm
    # Autograd refuses a K that is written after it was multiplied. Where NaN is added to a row,
    # eager's gradients of it are NaN too; ours are 0.
    if made.mutant == K_WRITTEN or dead and additive:
        made.training = False
    hides = made.masks or made.hides or made.given or made.captured in ("infinite bias", EXPRESSION)
    replaced = made.mutant in ("two softmaxes", "weights masked") or made.after in after.FILLS
    if made.softmax == "silu" and replaced and hides:
        made.training = False  # silu(-inf) is NaN, which that hides: docs/numerics.md
    if made.softmax in softmaxes.OF_MASKS and made.after in after.REPLACES_NAN and dead:
        made.training = False  # so is 0 / 0 of a row without keys
    if made.softmax in softmaxes.NEEDS_KEYS and (dead or made.captured == "infinite bias"):
        # 0 / 0 in eager, where all of a row vanishes: docs/numerics.md.
        made.softmax = "by hand"
    if made.softmax in softmaxes.OF_MASKS and (made.expression or made.hides):
        made.dynamic = None  # a fill that is known when it runs alone may be all that a row sees
    if made.softmax == "base two" and dead:
        made.softmax = "power of two"  # finfo.min * log2(e) overflows: docs/numerics.md
    if dead and made.fill in ("-1e4", "-65504"):
        # A row that is all -1e4 has scores of three digits: any other order rounds otherwise.
        made.kernels = ("reference",)
        made.fill = "-1e9" if made.on_gpu else made.fill
    alone = made.sizes.n == 1 and made.masks  # whose query may see one key
    if alone or made.given and not made.captured.split(" ")[1].endswith("k"):
        made.frozen = ""  # a gradient that is 0, and nothing to measure its rounding by
    if made.on_gpu:
        made.kernels = None
        # Gigabytes, for what is left.
        written_out = made.of_scores == layouts.WRITTEN_OUT, made.of_values == layouts.WRITTEN_OUT
        made.of_scores = "operator" if written_out[0] else made.of_scores
        made.of_values = "operator" if written_out[1] else made.of_values
