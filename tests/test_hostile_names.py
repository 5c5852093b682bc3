"""What a model calls its tensors, files and functions never reaches generated code as code."""

import pytest
import torch
from torch import nn

from fa3_compile.backend import rewritten
from fa3_compile.explaining import explain_with
from fa3_compile.lower.render.render_cuda import CudaKey
from fa3_compile.lower.render.render_forward import ForwardKey
from fa3_compile.lower.tiles.config_sm90 import Sm90Config
from fa3_compile.repro import repro
from fa3_compile.spec.attention import AttentionSpec

CANARY = "Canary_4711"
NAMES = [
    f'"""; raise SystemExit("{CANARY}") #',
    f"'''\nraise SystemExit('{CANARY}')\n'''",
    f"*/ #error {CANARY} /*",
    f"// {CANARY} \\\n",
    f"{{{{ {CANARY} }}}}{{% raw %}}",
    f"${{{CANARY}}}`{CANARY}`$({CANARY})",
    f"</script><script>{CANARY}",
    f" #;kernels={CANARY}",
    f"\u202e{CANARY}\x00\x1b[31m",
]


class Model(nn.Module):
    """ALiBi whose slopes live under a hostile name."""

    def __init__(self, name: str, learned: bool) -> None:
        super().__init__()
        self.name = name
        value = torch.tensor([0.5, 0.25])
        if learned:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    def forward(self, x, masks):
        at = torch.arange(x.shape[-2])
        slopes = getattr(self, self.name)[:, None, None]
        scores = x @ x.mT * 0.25 + slopes * (at - at[:, None])
        scores = scores.masked_fill(~masks[self.name][:, None, None, :], float("-inf"))
        return scores.softmax(-1) @ x


def report_of(name, learned):
    model = Model(name, learned)
    inputs = (torch.randn(1, 2, 8, 16), {name: torch.ones(1, 8, dtype=torch.bool)})
    return model, inputs, explain_with(rewritten, model, inputs, {}, {"kernels": "reference"}, None)


@pytest.mark.parametrize("learned", [False, True], ids=["buffer", "parameter"])
@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_no_name_gets_into_a_spec_or_a_kernel(name, learned):
    model, inputs, report = report_of(name, learned)
    (region,) = report.regions
    assert region.fused and "load(1" in region.spec
    assert str(AttentionSpec.parse(region.spec)) == region.spec
    spec = AttentionSpec.parse(region.spec)
    elements = tuple(
        {"bool": "unsigned char", "int": "int64_t", "float": "float"}[k] for k in spec.aux
    )
    sources = [
        ForwardKey(spec, 16, 16).source(),
        CudaKey(spec, "Bf16", 16, 16, Sm90Config(64, 64), elements).source(),
        region.spec,
        str(report),
    ]
    assert not any(CANARY in source for source in sources)
    script = repro(model, inputs, region=0, options={"kernels": "reference"}).script
    # As a word of a name that fx made an identifier, and nothing else.
    assert script.count(CANARY) == len([w for w in script.split() if CANARY in w])
    compile(script, "repro.py", "exec")


def test_a_hostile_file_and_function_show_up_as_text_alone(tmp_path):
    name = f'x"""; raise SystemExit("{CANARY}") #.py'
    source = "def attend(x):\n    return (x @ x.mT).softmax(-1) @ x, (x @ x.mT).softmax(-1)  # %s\n"
    made: dict = {}
    exec(compile(source % CANARY, str(tmp_path / name), "exec"), made)
    attend = made["attend"]
    attend.__name__ = attend.__qualname__ = NAMES[0]
    script = repro(attend, (torch.randn(1, 2, 6, 8),), region=0).script
    code = [line for line in script.splitlines() if not line.startswith("#")]
    assert not any(CANARY in line for line in code)


@pytest.mark.parametrize(
    "text",
    [
        "attention(score=__import__('os').abort())",
        "attention(score=s.__class__)",
        "attention(score=(lambda: s)())",
        "attention(score=[s for s in (1,)])",
        "attention(score=eval('s'))",
        "attention(score=s, mask=open('/etc/passwd'))",
        "attention(score=f'{s}')",
        "attention(score=s; import os)",
        "attention(score=load(0, '\"; __asm__(\"trap;\")'))",
        "attention(score=s, dead=\"zero */\")",
        "attention(score=s, out_order=bhqd__import__)",
        "attention(**{'score': s})",
        "attention(score=10**10**10)",
        "attention(score=" + "(" * 10000 + "s" + ")" * 10000 + ")",
    ],
)  # fmt: skip
def test_a_spec_is_parsed_and_never_evaluated(text):
    with pytest.raises(ValueError):
        AttentionSpec.parse(text)
