"""Named forms: what a spec is called in the report.

A form recognises one term of the score or one conjunct of the mask by comparing expressions; a
spec's name is the names of its parts. What has no name is called custom, and works as well.
"""

from fa3_compile.spec.forms.masks import mask_names
from fa3_compile.spec.forms.scores import score_names

__all__ = ["mask_names", "name_of", "score_names"]


def name_of(spec) -> str:
    """The spec's form, such as "softcap(50) + causal + window(4096)"; "plain" without any."""
    names = [*score_names(spec.score), *mask_names(spec.mask)]
    if spec.sinks:
        names.append("sink")
    return " + ".join(names) or "plain"
