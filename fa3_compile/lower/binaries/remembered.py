"""What was found out about a spec, kept on disk for the processes that come after."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable
from typing import TypeVar

from fa3_compile import resources
from fa3_compile.lower.binaries import cache
from fa3_compile.spec.attention import AttentionSpec

AnswerT = TypeVar("AnswerT", bound="str | bool | None")
KIND, FILE = "remembered", "answer.json"


def remembered(function: Callable[[AttentionSpec], AnswerT]) -> Callable[[AttentionSpec], AnswerT]:
    """The function, which depends on its spec and our sources alone, run once for each spec and
    kept for all processes: sympy takes up to 20 ms for bounds of a mask, a file 0.3."""

    @functools.lru_cache(maxsize=1024)
    @functools.wraps(function)
    def found(spec: AttentionSpec) -> AnswerT:
        named = (function.__module__, function.__qualname__, str(spec), resources.source_hash())
        key = hashlib.sha256(repr(named).encode()).hexdigest()[:24]
        if (files := cache.read(KIND, key)) is not None:
            return json.loads(files[FILE])
        answer = function(spec)
        with contextlib.suppress(OSError):  # it is asked again next time
            cache.write(KIND, key, {FILE: json.dumps(answer)})
        return answer

    return found
