"""Hugging Face models' attention, and its closed form in a line or two.

Tiny models of random weights under `attn_implementation="eager"`; padded on the side on which
their users pad, and without padding.
"""

from __future__ import annotations

from expecttest import assert_expected_inline

from fa3_compile.report import Report
from tests.graph.harness import check
from tests.models.zoo import BY_NAME


def report_of(name: str, padding: str | None = None) -> Report:
    architecture = BY_NAME[name]
    inputs = architecture.inputs(batch=2, length=24, padding=padding)
    report = check(architecture.make(), training=False, **inputs)
    assert len(report.regions) == architecture.regions
    return report


def forms(report: Report) -> str:
    """Each region's name, score and mask; alike ones once."""
    lines = {}
    for region in report.regions:
        said = f"{region.form}: {region.score}" + (f" where {region.mask}" if region.mask else "")
        lines[said if region.fused else f"{region.stage}: {region.reason}"] = None
    return "\n".join(lines)


def test_llama():
    assert_expected_inline(forms(report_of("llama", "none")), """causal: 0.25*s where kv <= q""")
    assert_expected_inline(
        forms(report_of("llama")),
        """causal + per-key mask: 0.25*s where (kv <= q) & (load(0, b, kv) != 0)""",
    )


def test_gemma2():
    assert_expected_inline(
        forms(report_of("gemma2", "none")),
        """\
softcap(3) + causal + window(8): 3*tanh(0.09622504486493762*s) where (kv <= q) & (kv >= q - 7)
softcap(3) + causal: 3*tanh(0.09622504486493762*s) where kv <= q""",
    )
    assert_expected_inline(
        forms(report_of("gemma2")),
        """\
softcap(3) + causal + per-key mask + window(8): 3*tanh(0.09622504486493762*s) where (kv <= q) & (kv >= q - 7) & (load(0, b, kv) != 0)
softcap(3) + causal + per-key mask: 3*tanh(0.09622504486493762*s) where (kv <= q) & (load(0, b, kv) != 0)""",
    )


def test_bloom():
    assert_expected_inline(
        forms(report_of("bloom", "none")),
        """ALiBi + causal: kv*load(0, h) + 0.25*s where kv <= q""",
    )
    assert_expected_inline(
        forms(report_of("bloom")),
        """ALiBi + causal + per-key mask: (load(1, b, kv) - 1)*load(0, h)*load(2, b, kv) + 0.25*s where (kv <= q) & (load(2, b, kv) != 0)""",
    )


def test_bert():
    assert_expected_inline(forms(report_of("bert", "none")), """plain: 0.25*s""")
    assert_expected_inline(
        forms(report_of("bert")), """per-key mask: 0.25*s where load(0, b, kv) != 0"""
    )


def test_t5():
    assert_expected_inline(
        forms(report_of("t5", "none")),
        """\
bias: load(0, h, kv - q + 23) + s
bias + causal: load(0, h, kv - q + 16) + s where kv <= q
plain: s""",
    )
    assert_expected_inline(
        forms(report_of("t5")),
        """\
bias + per-key mask: load(0, h, kv - q + 23) + s where load(1, b, kv) != 0
bias + causal + per-key mask: load(0, h, kv - q + 16) + s where (kv <= q) & (load(1, b, kv) != 0)
per-key mask: s where load(0, b, kv) != 0""",
    )


def test_gpt_oss():
    assert_expected_inline(
        forms(report_of("gpt_oss")),
        """\
causal + per-key mask + window(8) + sink: 0.25*s where (kv <= q) & (kv >= q - 7) & (load(0, b, kv) != 0)
causal + per-key mask + sink: 0.25*s where (kv <= q) & (load(0, b, kv) != 0)""",
    )


def test_gpt_neo():
    assert_expected_inline(
        forms(report_of("gpt_neo")),
        """causal + dense mask + per-key mask: s where (kv <= q) & (load(0, 0, 0, q, kv) != 0) & (load(1, b, kv) != 0)""",
    )


def test_mpt():
    assert_expected_inline(
        forms(report_of("mpt")),
        """ALiBi + causal + per-key mask: (kv - 23)*pow(load(1, h), -1) + 0.25*s where (kv <= q) & (load(0, b, kv) != 0)""",
    )


def test_modernbert():
    assert_expected_inline(
        forms(report_of("modernbert")),
        """\
per-key mask + window(left=8, right=8): 0.25*s where (kv <= q + 8) & (kv >= q - 8) & (load(0, b, kv) != 0)
per-key mask: 0.25*s where load(0, b, kv) != 0""",
    )


def test_deberta():
    assert_expected_inline(
        forms(report_of("deberta-v2")),
        """bias + per-key mask + per-query mask: 0.14433756729740646*load(1, 4*b + h, q, kv) + 0.14433756729740646*load(2, 4*b + h, q, kv) + 0.14433756729740646*s where (load(0, b, kv) != 0) & (load(0, b, q) != 0)""",
    )


def test_vit():
    assert_expected_inline(forms(report_of("vit")), """plain: 0.25*s""")
