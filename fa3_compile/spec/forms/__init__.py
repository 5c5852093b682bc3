"""Named forms: what a spec is called in the report.

A form recognises one term of the score or one conjunct of the mask by comparing expressions; a
spec's name is the names of its parts. What has no name is called custom, and works as well.
"""

from fa3_compile.spec.forms.masks import mask_names
from fa3_compile.spec.forms.scores import score_names
from fa3_compile.spec.forms.unnormalised import unnormalised_names
from fa3_compile.spec.forms.weights import dropout_weight, weight_names

__all__ = [
    "dropout_weight",
    "mask_names",
    "name_of",
    "score_names",
    "unnormalised_names",
    "weight_names",
]


def name_of(spec) -> str:
    """The spec's form, such as "softcap(50) + causal + window(4096)"; "plain" without any."""
    score = score_names(spec.score) if spec.normalized else unnormalised_names(spec.score)
    names = [*score, *mask_names(spec.mask)]
    if spec.sinks:
        names.append("sink")
    names += weight_names(spec.weight)
    return " + ".join(names) or "plain"
