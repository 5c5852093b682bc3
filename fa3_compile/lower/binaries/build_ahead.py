"""Kernels are built while the rest of a model is compiled, in threads of this process: NVRTC does
not hold the interpreter's lock."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from fa3_compile.lower.choose import Problem

log = logging.getLogger(__name__)

# A processor stays with the thread that compiles the model.
_free = threading.BoundedSemaphore(max(1, (os.cpu_count() or 1) - 1))
# What is running, so that the layers of a model are one: added to by the thread that compiles.
_running: set[tuple[Callable[[Problem], object], Problem]] = set()


def begin(build: Callable[[Problem], object], problem: Problem) -> None:
    """Runs it in a thread of its own, where there is a processor for one, and returns at once.

    It should end in `build_nvrtc.load`, where whoever needs the same kernel meanwhile waits for it.
    What goes wrong is left to them: they build it again, and report it.
    """
    work = (build, problem)
    if work in _running or not _free.acquire(blocking=False):
        return
    _running.add(work)

    def end() -> None:
        _running.discard(work)
        _free.release()

    def run() -> None:
        try:
            build(problem)
        except Exception as error:
            log.debug("a kernel could not be built ahead: %s", error)
        finally:
            end()

    try:
        # Not a daemon: the interpreter must not end under a compiler that is running.
        threading.Thread(target=run, name="fa3-build").start()
    except RuntimeError:  # too many threads, or Python is shutting down
        end()
