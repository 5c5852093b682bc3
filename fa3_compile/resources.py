"""Where the kernel sources are: inside the package in a wheel, beside it in a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def templates() -> Path:
    """The folder of kernel templates: `triton/*.py.jinja`, `cuda/*.cu.jinja`."""
    return _find("templates")


def kernels() -> Path:
    """The folder of CUDA C++ headers that the CUDA templates include."""
    return _find("kernels")


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
