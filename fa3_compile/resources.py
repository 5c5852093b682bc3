"""Where the kernel sources are: inside the package in a wheel, beside it in a checkout."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import sympy

_PACKAGE = Path(__file__).resolve().parent


def templates() -> Path:
    """The folder of kernel templates: `triton/*.py.jinja`, `cuda/*.cu.jinja`."""
    return _find("templates")


def kernels() -> Path:
    """The folder of CUDA C++ headers that the CUDA templates include."""
    return _find("kernels")


@functools.cache
def source_hash() -> str:
    """16 hex digits that change with any source of ours, and with sympy, which decides what kernels
    say: salt for the caches of compiled graphs.

    PyTorch's caches know nothing of code outside of it, and would serve what an older version of
    this package generated.
    """
    digest = hashlib.sha256(sympy.__version__.encode())
    for root, pattern in ((_PACKAGE, "*.py"), (templates(), "*"), (kernels(), "*")):
        for file in sorted(path for path in root.rglob(pattern) if path.is_file()):
            digest.update(f"{file.relative_to(root).as_posix()}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _find(folder: str) -> Path:
    # A wheel's folder comes first: in site-packages, `templates` beside us may be anybody's.
    if (_PACKAGE / folder).is_dir():
        return _PACKAGE / folder
    checkout = _PACKAGE.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / folder).is_dir():
        return checkout / folder
    raise FileNotFoundError(
        f"fa3_compile's {folder}/ is neither at {_PACKAGE / folder} (an installed package) nor at "
        f"{checkout / folder} (a checkout): the installation is incomplete. Install the package "
        "again, or use a whole checkout of the repository."
    )
