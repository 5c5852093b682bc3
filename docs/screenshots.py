"""The pictures of the report in the documentation.

    python docs/screenshots.py html report.html    a report of some of the gallery's forms, timed
    python docs/screenshots.py png report.html     docs/images/report.png of it, by a browser

The first runs where the kernels are, the second where there is Chromium or Chrome.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "docs")) if path not in sys.path]

import torch

import gallery_forms as gallery
from fa3_compile.bench import bench
from fa3_compile.options import KERNELS

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SHOWN = (gallery.softcap, gallery.sliding_window, gallery.chunked)
HEADS, LENGTH, DIM = 16, 4096, 128


def layers(q, k, v, slopes):
    """One attention after another, then one that nobody can fuse."""
    for form in SHOWN:
        v = form(q, k, v)
    v = gallery.alibi(q, k, v, slopes)
    running = (q @ k.transpose(-2, -1)).cumsum(-1)
    return torch.softmax(running, dim=-1) @ v


def html(path: Path, length: int = LENGTH) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = (1, HEADS, length, DIM)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    slopes = 2.0 ** -torch.arange(1.0, HEADS + 1, device=device)
    # Without a GPU the reference stands in for the kernels that want one.
    options = {} if device == "cuda" else {"kernels": KERNELS}
    report, _ = bench(layers, (q, k, v, slopes), training=False, options=options)
    report.to_html(path)


def png(page: Path, picture: Path = ROOT / "docs" / "images" / "report.png") -> None:
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"no browser: none of {', '.join(BROWSERS)}")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    size, shot = "--window-size=900,1500", f"--screenshot={picture.resolve()}"
    subprocess.run([*command, size, shot, page.resolve().as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    {"html": html, "png": png}[sys.argv[1]](*map(Path, sys.argv[2:]))
