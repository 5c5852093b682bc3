"""The options of `backend="fa3"`: what they may be, where they come from, what Inductor gets."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, get_origin

from fa3_compile.errors import OptionError, nearest

log = logging.getLogger(__name__)

KERNELS = ("reference", "cpu", "triton", "cuda_sm90")
OTHER_VARIABLES = ("FA3_CACHE_DIR",)


@dataclass(frozen=True)
class Options:
    """How the pass and its kernels behave.

    Each field is an entry of `torch.compile(..., backend="fa3", options={...})` and, in capitals,
    an environment variable: `autotune` is `FA3_AUTOTUNE`; one that is empty is not set. Options
    win over the environment.
    Raises OptionError for an illegal value.

    autotune       how tile configs are chosen: "none" from a table, "quick" by measuring the most
                   promising, "full" by measuring all
    kernels        the kernel families that may be used; None for all of them
    strict         a bug in the pass raises, rather than being logged with the graph left alone
    deterministic  the same bits in every run; Inductor is told too
    fuel           stop after this many rewrites, to bisect; None for no limit
    verify         run the reference beside every kernel and compare
    """

    autotune: str = "none"
    kernels: tuple[str, ...] | None = None
    strict: bool = False
    deterministic: bool = False
    fuel: int | None = None
    verify: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = _checked(field.name, getattr(self, field.name), where="Options")
            object.__setattr__(self, field.name, value)

    def for_kernels(self) -> dict[str, str]:
        """What differs from the default and matters once the graph is rewritten, as text.

        It goes into the operator's spec text (`runtime.op.join_text`), hence into cache keys.
        """
        told = {}
        for name in ("autotune", "kernels", "deterministic", "verify"):
            value = getattr(self, name)
            if value != getattr(Options, name):
                told[name] = ",".join(value) if isinstance(value, tuple) else str(value)
        return told


def split(
    options: Mapping[str, Any] | None = None, mode: str | None = None
) -> tuple[Options, dict[str, Any]]:
    """Our options, and the patches of `torch._inductor.config` for the rest.

    `options` and `mode` are those of `torch.compile`. A mode means to Inductor what it always
    does; "max-autotune" and its variants also mean `autotune="full"`.

    Raises OptionError for an unknown name or mode, and for a value of the wrong type.
    """
    from torch._inductor import config

    where = 'options of torch.compile(..., backend="fa3")'
    theirs = config.get_config_copy()
    ours = _from_environment()
    patches = _mode_patches(mode)
    if mode and mode.startswith("max-autotune"):
        ours["autotune"] = "full"
    for name, value in (options or {}).items():
        key = str(name).replace("-", "_")
        if key in _FIELDS:
            ours[key] = _checked(key, value, where)
        elif key in theirs:
            patches[key] = _checked_for_inductor(key, value, where)
        else:
            bare = key.removeprefix("fa3_").removeprefix("fa3.")
            raise OptionError.unknown(str(name), _FIELDS, others=theirs, where=where, like=bare)
    if "deterministic" in ours and "deterministic" in theirs:
        patches["deterministic"] = ours["deterministic"]
    return Options(**ours), patches


class _Field(NamedTuple):
    takes: str
    accepts: Callable[[Any], bool]
    from_text: Callable[[str], Any]


def _flag(text: str) -> bool | str:
    words = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}
    return words.get(text.lower(), text)


def _count(text: str) -> int | str | None:
    if text.lower() == "none":
        return None
    return int(text) if text.isdecimal() else text


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


_EFFORTS = ("none", "quick", "full")
_SWITCH = _Field("True or False (1 or 0 in the environment)", lambda v: type(v) is bool, _flag)
_FIELDS = {
    "autotune": _Field(
        "'none', 'quick' or 'full'", lambda v: isinstance(v, str) and v in _EFFORTS, str.lower
    ),
    "kernels": _Field(
        "None, the name of a kernel family, or a tuple of names",
        lambda v: (
            v is None or (type(v) is tuple and v != () and all(isinstance(n, str) for n in v))
        ),
        _names,
    ),
    "strict": _SWITCH,
    "deterministic": _SWITCH,
    "fuel": _Field(
        "None or the number of rewrites to stop after, 0 or more",
        lambda v: v is None or (type(v) is int and v >= 0),
        _count,
    ),
    "verify": _SWITCH,
}


def _checked(name: str, value: Any, where: str) -> Any:
    """The value in its canonical form: names of kernels become a tuple."""
    if name == "kernels" and isinstance(value, (str, list)):
        value = (value,) if isinstance(value, str) else tuple(value)
    if not _FIELDS[name].accepts(value):
        raise OptionError.illegal(name, value, _FIELDS[name].takes, where=where)
    if name == "kernels" and value is not None:
        for kernel in value:
            if kernel not in KERNELS:
                raise OptionError.unknown(kernel, KERNELS, where=f"option 'kernels' in {where}")
    return value


def _from_environment() -> dict[str, Any]:
    found = {}
    for variable, text in os.environ.items():
        name = variable.removeprefix("FA3_").lower()
        if variable.startswith("FA3_") and name in _FIELDS:
            where = f"environment variable {variable}"
            if text:
                found[name] = _checked(name, _FIELDS[name].from_text(text), where)
        elif variable.startswith("FA3_") and variable not in OTHER_VARIABLES:
            _warn_of_variable(variable)
    return found


@functools.cache
def _warn_of_variable(variable: str) -> None:
    names = (*_FIELDS, *(name.removeprefix("FA3_").lower() for name in OTHER_VARIABLES))
    close = nearest(variable.removeprefix("FA3_"), names)
    if close:
        log.warning("%s is not read; did you mean FA3_%s?", variable, close.upper())


def _mode_patches(mode: str | None) -> dict[str, Any]:
    from torch._inductor import list_mode_options

    try:
        return dict(list_mode_options(mode)) if mode else {}
    except RuntimeError as error:
        legal = sorted(list_mode_options())
        where = 'mode of torch.compile(..., backend="fa3")'
        raise OptionError.unknown(str(mode), legal, where=where) from error


def _checked_for_inductor(name: str, value: Any, where: str) -> Any:
    # The rule of torch's own wrapper for backend="inductor": generic types are not checked.
    from torch._inductor import config

    wanted = config.get_type(name)  # pyright: ignore[reportAttributeAccessIssue]
    if get_origin(wanted) is None and not isinstance(value, wanted):
        kind = wanted.__name__
        article = "an" if kind[0] in "aeiou" else "a"
        takes = f"{article} {kind}, as torch._inductor.config.{name} is"
        raise OptionError.illegal(name, value, takes, where=where)
    return value
