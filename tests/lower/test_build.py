"""Generated Triton modules: imported from the cache, their sources named in the log."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import pytest

from fa3_compile.lower.binaries import build
from fa3_compile.lower.choose import KernelBuildError
from fa3_compile.spec.attention import AttentionSpec


@dataclass(frozen=True)
class Text:
    text: str
    spec: AttentionSpec = AttentionSpec()

    @property
    def digest(self) -> str:
        return f"test{hash(self.text) & 0xFFFFFF}"

    def source(self) -> str:
        return self.text


def test_a_source_is_imported_and_named_in_the_log(caplog) -> None:
    key = Text("tile = 128\n")
    with caplog.at_level(logging.DEBUG, "fa3_compile"):
        assert build.load(key).tile == 128
    [said] = caplog.messages
    assert Path(said.removeprefix(f"{key.spec}: ")).read_text() == key.text


def test_a_source_that_does_not_import_says_where_it_lies() -> None:
    with pytest.raises(KernelBuildError, match=r"kernel\.py does not import: name 'nonsense'"):
        build.load(Text("nonsense\n"))
