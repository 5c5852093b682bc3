"""Are the models of tests/models/zoo.py right, and fused, in the settings in which people run them?

    python benchmarks/coverage/model_settings.py --out FILE.csv [--setting NAME ...] [MODEL ...]

On the CPU, each model and setting in a process of its own: the rewritten graphs run as they are,
and outputs, and gradients where a setting trains, are compared with float64 eager. Rows that the
file has are not run again.

Columns: model; setting; fused, the attentions that ran in one; left, the softmaxes that still ran,
by source line; reasons, of regions left alone; graphs, how many Dynamo compiled, and, where they
are several, eager_graphs, how many it compiles for a backend that adds no guards; numbers, "ok" or
what differs; problem, why the model does not run in this setting.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.coverage.architectures import Rewritten, Task, line, quiet, write_rows
from fa3_compile import testing
from fa3_compile.report import collect
from tests.models.architecture import Architecture, sharpen
from tests.models.inputs import Inputs, Padding
from tests.models.zoo import ARCHITECTURES
from tests.models.zoo_text import TEXT

COLUMNS = (
    *("model", "setting", "fused", "left", "reasons", "graphs", "eager_graphs"),
    *("numbers", "problem"),
)
MODELS = {x.name: x for x in (*ARCHITECTURES, *TEXT)}
LENGTH, PROMPT, NEW = 24, 13, 9
Call = Callable[[Any, Architecture], Any]


@dataclass(frozen=True)
class Setting:
    """How a model is built and called.

    call        (model, architecture) -> outputs
    fields      of the configuration
    attention   attn_implementation
    head        whether the model has its language model's head
    training    whether it is in training mode, and gradients are compared
    dtype       of parameters and inputs, but for the oracle's
    prepare     what is done to the model before it is called
    around      what it is called in, but for the oracle
    compile     arguments of torch.compile
    """

    call: Call
    fields: dict[str, Any] | None = None
    attention: str = "eager"
    head: bool = False
    training: bool = False
    dtype: torch.dtype = torch.float32
    prepare: Callable[[Any], None] = lambda model: None
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    compile: dict[str, Any] | None = None

    def make(self, architecture: Architecture, dtype: torch.dtype) -> nn.Module:
        config = configuration(architecture, self.fields or {})
        torch.manual_seed(0)
        kind = head_class(config) if self.head else transformers.AutoModel
        model = kind.from_config(config, attn_implementation=self.attention)
        model = sharpen(model, architecture.gain).train(self.training).to(dtype)
        self.prepare(model)
        return model

    def run(self, architecture: Architecture, dtype: torch.dtype, wrap) -> testing.Result:
        model: Any = self.make(architecture, dtype)
        model.forward = wrap(model.forward)
        torch.manual_seed(0)
        with torch.set_grad_enabled(self.training):
            produced = self.call(model, architecture)
        outputs = {
            f"output {i}": x for i, x in enumerate(tree_leaves(produced)) if isinstance(x, Tensor)
        }
        leaves = {n: p for n, p in model.named_parameters() if p.requires_grad}
        gradients = testing._gradients(outputs, leaves) if self.training else {}
        return testing.Result({n: x.detach() for n, x in outputs.items()}, gradients)


def configuration(architecture: Architecture, fields: dict[str, Any]) -> Any:
    config = {"use_cache": False, **architecture.config, **fields}
    return transformers.AutoConfig.for_model(architecture.name, **config)


def head_class(config: Any) -> Any:
    if type(config) in transformers.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING:
        return transformers.AutoModelForSpeechSeq2Seq
    if config.is_encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM
    if not _decodes(config):
        raise ValueError("no decoder")
    return transformers.AutoModelForCausalLM


def _decodes(config: Any) -> bool:
    maps_to = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return type(config) in maps_to and type(config) not in transformers.MODEL_FOR_MASKED_LM_MAPPING


def inputs(
    model: Any,
    architecture: Architecture,
    padding: Padding | None = None,
    *,
    batch: int = 2,
    length: int = LENGTH,
) -> Inputs:
    return architecture.inputs(batch, length, dtype=model.dtype, padding=padding)


def called(padding: Padding | None = None, **more: Any) -> Call:
    return lambda model, architecture: model(**inputs(model, architecture, padding), **more)


def of_changing_sizes(model: Any, architecture: Architecture) -> Any:
    sizes = ((2, 24), (3, 31), (2, 40), (5, 17))
    return [model(**inputs(model, architecture, batch=b, length=n))[0] for b, n in sizes]


def packed(model: Any, architecture: Architecture) -> Any:
    """Documents of 9, 4 and 11 tokens in one row."""
    made = inputs(model, architecture, "none", batch=1)
    positions = torch.cat([torch.arange(n) for n in (9, 4, LENGTH - 13)])[None]
    return model(**made, position_ids=positions)


def generated(**how: Any) -> Call:
    """Greedy generation from a padded prompt: the logits of each step, and the tokens."""

    def call(model: Any, architecture: Architecture) -> Any:
        made = inputs(model, architecture, length=PROMPT)
        made = {n: x for n, x in made.items() if not n.startswith("decoder")}
        config = model.generation_config
        config.disable_compile, config.eos_token_id, config.forced_eos_token_id = True, None, None
        produced = model.generate(
            **made,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **how,
        )
        return produced.logits, produced.sequences

    return call


def twice(model: Any, architecture: Architecture) -> Any:
    """Two turns of a conversation: the second prompt joins a cache of the first."""
    made = inputs(model, architecture, "none", length=PROMPT)
    first = model(**made, use_cache=True)
    more = inputs(model, architecture, "none", length=5)["input_ids"]
    second = model(input_ids=more, past_key_values=first.past_key_values, use_cache=True)
    third = model(input_ids=more[:, :1], past_key_values=second.past_key_values, use_cache=True)
    return first.logits, second.logits, third.logits


def checkpointed(model: Any) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})


def autocast() -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


CACHED = {"use_cache": True}
SETTINGS: dict[str, Setting] = {
    "plain": Setting(called("none")),
    "left": Setting(called("left")),
    "right": Setting(called("right")),
    "sdpa": Setting(called(), attention="sdpa"),
    "sdpa_plain": Setting(called("none"), attention="sdpa"),
    "flex": Setting(called(), attention="flex_attention"),
    "flex_plain": Setting(called("none"), attention="flex_attention"),
    "train": Setting(called("right"), training=True),
    "train_sdpa": Setting(called("right"), training=True, attention="sdpa"),
    "checkpoint": Setting(called("right"), training=True, prepare=checkpointed),
    "dynamic": Setting(of_changing_sizes, compile={"dynamic": True}),
    "dynamic_sdpa": Setting(of_changing_sizes, compile={"dynamic": True}, attention="sdpa"),
    "automatic": Setting(of_changing_sizes),
    "bf16": Setting(called(), dtype=torch.bfloat16),
    "bf16_train": Setting(called("right"), dtype=torch.bfloat16, training=True),
    "autocast": Setting(called(), around=autocast),
    "autocast_train": Setting(called("right"), around=autocast, training=True),
    "weights": Setting(called(output_attentions=True)),
    "weights_train": Setting(called("right", output_attentions=True), training=True),
    "packed": Setting(packed),
    "packed_sdpa": Setting(packed, attention="sdpa"),
    "packed_train": Setting(packed, training=True),
    "generate": Setting(generated(), head=True, fields=CACHED),
    "generate_sdpa": Setting(generated(), head=True, fields=CACHED, attention="sdpa"),
    "static": Setting(generated(cache_implementation="static"), head=True, fields=CACHED),
    "static_sdpa": Setting(
        generated(cache_implementation="static"), head=True, fields=CACHED, attention="sdpa"
    ),
    "beams": Setting(generated(num_beams=3), head=True, fields=CACHED),
    "chunked": Setting(generated(prefill_chunk_size=5), head=True, fields=CACHED),
    "twice": Setting(twice, head=True, fields=CACHED),
}


@contextlib.contextmanager
def plain_flex() -> Iterator[None]:
    """flex_attention as eager PyTorch runs it: transformers would compile it in eager code too."""
    from transformers.integrations.flex_attention import WrappedFlexAttention

    flex._validate_device = lambda *_: None
    with mock.patch.object(WrappedFlexAttention, "__call__", lambda self: flex.flex_attention):
        yield


def row_of(architecture: Architecture, name: str) -> dict[str, Any]:
    setting = SETTINGS[name]
    row: dict[str, Any] = {"model": architecture.name, "setting": name}
    wide = testing._wide_oracle if setting.attention != "flex_attention" else _wide_default
    with plain_flex():
        try:
            with wide():
                oracle = setting.run(architecture, torch.float64, lambda fn: fn)
            with setting.around():
                eager = setting.run(architecture, setting.dtype, lambda fn: fn)
        except Exception as error:
            return row | {"problem": line(error)}
        backend = Rewritten()
        graphs = Graphs(backend)
        with collect() as report:
            try:
                with setting.around():
                    ours = setting.run(architecture, setting.dtype, compiled(setting, graphs))
                testing.assert_close_to_oracle(ours, eager, oracle)
                row["numbers"] = "ok"
            except Exception as error:
                row["numbers"] = line(error)
        row["eager_graphs"] = graphs.count
        if graphs.count > 1:
            torch._dynamo.reset()
            plain = Graphs()
            with setting.around():
                setting.run(architecture, setting.dtype, compiled(setting, plain))
            row["eager_graphs"] = plain.count
    row |= {"fused": backend.fused, "graphs": graphs.count}
    row["left"] = "; ".join(f"{n}x {at}" for at, n in backend.left.items())
    reasons = {f"{x.code}: {x.reason}" for x in report.regions if not x.fused}
    return row | {"reasons": "; ".join(sorted(reasons))}


@contextlib.contextmanager
def _wide_default() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


class Graphs:
    """A backend that counts the graphs it is given."""

    def __init__(self, backend: Callable[..., Any] = lambda gm, _: gm) -> None:
        self.backend = backend
        self.count = 0

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        self.count += 1
        return self.backend(gm, example_inputs)


def compiled(setting: Setting, backend: Graphs):
    return lambda fn: torch.compile(fn, backend=backend, **(setting.compile or {}))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--setting", nargs="*", default=list(SETTINGS))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    quiet()
    tasks: list[Task] = [
        ({"model": name, "setting": setting}, functools.partial(row_of, MODELS[name], setting))
        for setting in options.setting
        for name in options.names or [x.name for x in ARCHITECTURES]
    ]
    return 1 if write_rows(options.out, COLUMNS, tasks, options.processes) else 0


if __name__ == "__main__":
    sys.exit(main())
