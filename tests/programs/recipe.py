"""What a random program that writes its attention out is made of, and what has to become of it.

Names are those of `layouts`, `masks`, `parts` and `mutants`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.programs import given, layouts, parts
from tests.programs.choices import Choices
from tests.programs.expressions import Expression, expression
from tests.programs.masks import MASKS, positions
from tests.programs.mutants import MORE_THAN_ATTENTION, NO_ATTENTION, OF_ELEMENTS
from tests.programs.parts import Sizes
from tests.programs.program import Expected

# Of two attentions: "difference" of their weights; "beside a call" of PyTorch's own.
TWO_ATTENTIONS = ("shared K and V", "difference", "beside a call")
OF_LSE = ("LSE", "function of LSE")
USES = ("residual", "twice", "slice", "sum", "in place", "flat", *OF_LSE, *TWO_ATTENTIONS)
# "flat batch" names every size but the length; "strided" cuts V's length to K's.
STATIC = ("flat batch", "strided", "cache that is written")
ADDITIVE = ("additive padding", "added empty sequence", "two paddings")
MAY_HIDE_ALL = ("padding", "empty sequence", *ADDITIVE, "random mask", "documents", "lengths")
# Whose weights have other batches than the operator, or heads in another order.
EXPRESSION, GIVEN = "expression", "given"
OTHER_BATCHES = ("windows", "one batch of K", "no batch", "gqa tiled")
BY_BATCH = (*MAY_HIDE_ALL, "bias", EXPRESSION)
K_WRITTEN = "K written after the scores"


@dataclass
class Recipe:
    """The parts of one program; "" for none. Of `of_scores` and `of_values` are the two products,
    `kernels` and below are how it is run."""

    layout: str
    sizes: Sizes
    of_scores: str
    of_values: str
    masks: list[str]
    how: str
    fill: str
    combine: str
    modifiers: list[str]
    captured: str
    expression: Expression | None
    scale: str
    softmax: str
    late: str
    sink: str
    after: str
    use: str
    context: str
    dtype: torch.dtype | None
    mutant: str
    seed: int
    dynamic: bool | None
    training: bool
    kernels: tuple[str, ...] | None
    numbers: str
    frozen: str

    @property
    def on_gpu(self) -> bool:
        return self.sizes.device != "cpu"

    @property
    def plain(self) -> bool:
        """Weights that are not normalised."""
        return self.softmax in parts.UNNORMALISED

    @property
    def given(self) -> str:
        """What is done with a tensor of `given`, "" without one."""
        return self.captured.split(" ", 2)[2] if self.captured.startswith(GIVEN) else ""

    @property
    def by_batch(self) -> bool:
        """What it captures differs from batch to batch."""
        return self.captured in BY_BATCH or self.captured.startswith(f"{GIVEN} b")

    @property
    def hides(self) -> bool:
        """What it captures hides keys."""
        return self.captured in MAY_HIDE_ALL or self.given in given.HIDING

    @property
    def adds_lowest(self) -> bool:
        """What it captures adds finfo.min to scores."""
        return self.captured in ADDITIVE or self.given == given.ADDITIVE

    @property
    def grows(self) -> bool:
        """Scores may be many times the product."""
        factors = ("temperature", EXPRESSION)
        return "cube" in self.modifiers or self.captured in factors or self.given in given.FACTORS

    @property
    def dead(self) -> bool:
        """There may be rows without a key."""
        also = self.expression or self.hides or self.captured == "infinite bias"
        if self.captured in MAY_HIDE_ALL or self.masks and also:
            return True
        return bool(self.masks) and self._masks_hide_rows()

    def _masks_hide_rows(self) -> bool:
        at = positions(torch.empty(self.sizes.n, self.sizes.m))
        seen: Tensor | None = None
        for each in (MASKS[name](*at) for name in self.masks):
            both = torch.logical_or if self.combine == "or" else torch.logical_and
            seen = each if seen is None else both(seen, each)
        return seen is not None and not bool(seen.any(-1).all())

    def made_of(self) -> dict[str, str]:
        """Its parts by the names under which they are counted."""
        masks = f"{self.combine} of {self.masks} by {self.how} of {self.fill}"
        return {
            "layout": self.layout,
            "products": f"{self.of_scores}, {self.of_values}",
            "lengths": f"{self.sizes.n} {self.sizes.m}",
            "head dim": str(self.sizes.dim),
            "masks": masks if self.masks else "",
            "modifiers": " ".join(self.modifiers),
            "captured": GIVEN if self.given else self.captured,
            GIVEN: self.given,
            "given axes": self.captured.split(" ")[1] if self.given else "",
            EXPRESSION: str(self.expression.text if self.expression else ""),
            "late": self.late,
            "scale": self.scale,
            "softmax": self.softmax,
            "sink": self.sink,
            "after": self.after,
            "use": self.use,
            "context": self.context,
            "mutant": self.mutant,
            "numbers": self.numbers,
            "frozen": self.frozen,
        }


def recipe(choices: Choices, device: str) -> tuple[Recipe, Expected]:
    """Parts that go together, and what has to become of a program of them."""
    made = _drawn(choices, device)
    _keep_finite(made)
    _keep_apart(made)
    _run_as_eager_can(made)
    expected = _expected(made)
    # One query of several heads that share a key is as good as several queries.
    # A checkpoint draws again where no AOTAutograd makes its random numbers functional.
    others = made.layout in OTHER_BATCHES or made.sizes.n == 1 or made.context == "checkpoint"
    if made.after == "dropout" and (expected != "fused" or others):
        made.after = ""  # it would draw other numbers
    return made, expected


def _drawn(choices: Choices, device: str) -> Recipe:
    one_of = choices.one_of
    layout = one_of("layout", *layouts.LAYOUTS)
    sizes = parts.sizes(choices, device, square=layout == "fused qkv")
    # Arguments are evaluated in this order, which a seed's programs depend on.
    return Recipe(
        layout=layout,
        sizes=sizes,
        of_scores=one_of("scores", "operator", "operator", *layouts.PRODUCTS),
        of_values=one_of("values", "operator", "operator", *layouts.PRODUCTS),
        masks=choices.up_to_two("masks", sorted(MASKS)),
        how=one_of("how", *parts.HOWS),
        fill=one_of("fill", *parts.FILLS),
        combine=one_of("combine", "and", "or", "twice"),
        modifiers=choices.up_to_two("modifiers", sorted(parts.MODIFIERS), unique=True),
        captured=(captured := _captured(choices)),
        expression=_expression(choices, sizes) if captured == EXPRESSION else None,
        scale=one_of("scale", *parts.SCALES),
        softmax=one_of("softmax", *parts.SOFTMAXES, "divided late", *parts.UNNORMALISED),
        late=one_of("late", *[""] * 20, *parts.LATE),
        sink=one_of("sink", "", "", "", "", *parts.SINKS),
        after=one_of("after", *parts.AFTER),
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
    exponential = made.softmax in parts.NEEDS_KEYS or made.plain
    if made.scale == "sharp" and (grows or exponential):
        made.scale = "after"  # powers and exponentials overflow
    if made.scale == "sharp" and made.after and half:
        made.scale = "after"  # all weight on one key: docs/numerics.md
    if grows and half and made.after in ("key gate", "head gate", "dropout"):
        made.after = ""  # the same
    if made.on_gpu and half and made.numbers == "V off zero":
        made.numbers = ""  # dQ is the difference of large numbers: docs/numerics.md
    if made.scale == "none" and (made.sizes.dim > 8 or grows):
        # Scores beyond what a softmax without a maximum takes, and of which float32 rounds much off.
        made.scale = "after"


def _keep_apart(made: Recipe) -> None:
    """Of parts that do not go together one is left out."""
    if made.softmax == "divided late" and (made.mutant or made.sink):
        made.softmax = "by hand"
    odd = made.plain or made.sink or made.mutant or made.softmax == "off by one"
    if made.use in OF_LSE and odd:
        made.use = ""
    if made.use == "difference" and (odd or made.softmax == "divided late"):
        made.use = ""
    if made.plain or made.mutant == "softmax over queries":
        made.sink = ""
    if made.use == "beside a call" and made.mutant in NO_ATTENTION:
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
    if made.use in OF_LSE and dead:
        made.use = ""  # of a row of fills eager's gradient is that of no logarithm
    # Autograd refuses a K that is written after it was multiplied. Where NaN is added to a row,
    # eager's gradients of it are NaN too; ours are 0.
    if made.mutant == K_WRITTEN or dead and additive:
        made.training = False
    hides = made.masks or made.hides or made.given or made.captured in ("infinite bias", EXPRESSION)
    if made.softmax == "silu" and made.mutant in ("two softmaxes", "weights masked") and hides:
        made.training = False  # silu(-inf) is NaN, which the mutant hides: docs/numerics.md
    if made.softmax in parts.NEEDS_KEYS and (dead or made.captured == "infinite bias"):
        # 0 / 0 in eager, where all of a row vanishes: docs/numerics.md.
        made.softmax = "by hand"
    if dead and made.fill in ("-1e4", "-65504"):
        # A row that is all -1e4 has scores of three digits: any other order rounds otherwise.
        made.kernels = ("reference",)
        made.fill = "-1e9" if made.on_gpu else made.fill
    if made.on_gpu:
        made.kernels = None


def _expected(made: Recipe) -> Expected:
    # The only query does not see the key that is left out.
    unseen = made.sizes.n == 1 and "not own" in made.masks
    if made.mutant in NO_ATTENTION and not (made.mutant in OF_ELEMENTS and made.plain):
        return "either" if made.mutant == "a key left out" and unseen else "left"
    return "either" if made.mutant or _either(made) else "fused"


def _either(made: Recipe) -> bool:
    """Whether a program that is attention may be left as it is."""
    layout, softmax, captured = made.layout, made.softmax, made.captured
    # Only the softmax of the scores themselves, added to at most, is blind to the maximum.
    other = made.modifiers[-1:] != ["CogView"] or made.masks or captured or made.sink
    # Which heads are whose is not known where their numbers are symbols.
    merged = (made.of_scores, made.of_values) != ("operator", "operator")
    if layout == "fused qkv":
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
            "CogView" in made.modifiers and (other or made.plain or softmax == "off by one"),
            # 0 * -inf is NaN, and fusing would lose that.
            made.how == "both"
            and made.masks
            and (captured in ("padding", "empty sequence", "lengths") or made.hides and made.given),
            # Eager does not normalise a row of one finite fill, spelled so.
            softmax == "logsumexp" and (made.masks or captured),
            made.context == "autocast",
            # A masked score is no small weight where it is multiplied by a decay, and silu(-inf)
            # is NaN.
            softmax in ("retention", "silu") and (made.masks or made.hides),
            # Conditions of several masks and the score are not told apart.
            softmax == "elu" and "in place" in made.masks,
            # Sums are given for weights that nothing has changed.
            softmax == "relu of its sum" and made.after,
            # A factor between the product and the division is not looked through.
            softmax == "divided late" and made.of_values == "baddbmm",
            made.dynamic and (layout == "fused qkv" or layout.startswith("gqa")) and merged,
            # The lengths of K and V are halves of the tensors', not known to be the scores'.
            made.dynamic and layout == "every other key",
            # A function of a masked score may make something else of its fill.
            made.late,
            # Two attentions.
            made.use in TWO_ATTENTIONS,
            # Weights without a softmax whose NaN are replaced.
            made.plain and made.after in ("nan_to_num", "isnan"),
            # Fills of several masks, added in float16, may make a row -inf everywhere.
            made.dtype == torch.float16
            and made.after in ("nan_to_num", "isnan")
            and made.masks
            and made.hides,
        )
    )
