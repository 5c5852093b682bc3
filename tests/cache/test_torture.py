"""The cache on disk under everything that happens to caches.

What is asked each time: nobody ever reads an entry that is not exactly as somebody wrote it, and
whoever needs a kernel gets one. The tests print how many times each thing was done (pytest -rP).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from fa3_compile.lower.binaries import cache
from fa3_compile.lower.binaries.remembered import remembered
from fa3_compile.spec.attention import AttentionSpec
from tests.cache.entry import FILES, KEY, KIND, entry, holds

ROOT = Path(__file__).parents[2]
KILLS, WRITERS, WRITES = 25, 8, 40


def python(code: str, home: Path, **options) -> subprocess.Popen:
    environment = {**os.environ, "FA3_CACHE_DIR": str(home), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


# ---- processes that die, and processes at once ----

LARGE = {"kernel.cu": "x" * 300000, "kernel.cubin": bytes(range(256)) * 4000}
ENDLESS = f"""
from fa3_compile.lower.binaries import cache
files = {{"kernel.cu": "x" * 300000, "kernel.cubin": bytes(range(256)) * 4000}}
cache.root()
print("ready", flush=True)
for i in range(100000):
    cache.write({KIND!r}, f"{KEY}{{i % 4}}", files)
    if i % 4 == 3:
        for k in range(4):
            cache.folder({KIND!r}, f"{KEY}{{k}}").joinpath("kernel.cu").write_text("damaged")
"""


def test_killed_in_the_middle_of_a_write(home):
    """A writer that damages and rewrites four entries is killed at random moments."""
    rng, whole = random.Random(0), 0
    wanted = {n: x.encode() if isinstance(x, str) else x for n, x in LARGE.items()}
    for _ in range(KILLS):
        writer = python(ENDLESS, home)
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0, 0.06))
        writer.kill()
        writer.communicate()
        for key in (f"{KEY}{k}" for k in range(4)):
            found = cache.read(KIND, key)
            assert found is None or found == wanted
            whole += found is not None
            # The lock died with its holder: this does not hang.
            cache.write(KIND, key, LARGE)
            assert cache.read(KIND, key) == wanted
    print(f"{KILLS} writers killed, {whole} of {4 * KILLS} entries whole when they died")


def test_leftovers_of_a_killed_writer_are_swept(home):
    cache.write(KIND, KEY, FILES)
    leftover = entry(home).with_name(f".{KEY}-abcdefgh")
    young = entry(home).with_name(f".{KEY}-younger1")
    for folder, age in ((leftover, 2 * cache.LEFTOVER_SECONDS), (young, 0)):
        folder.mkdir()
        (folder / "kernel.cu").write_text("half of")
        os.utime(folder, (time.time() - age,) * 2)
    (entry(home) / "kernel.cu").write_text("damaged")
    cache.write(KIND, KEY, FILES)
    assert holds() and young.exists() and not leftover.exists()


AT_ONCE = f"""
import contextlib, sys
from fa3_compile.lower.binaries import cache
files = {FILES!r}
cache.root()
print("ready", flush=True)
sys.stdin.readline()
seen = 0
for i in range({WRITES}):
    if i % 5 == int(sys.argv[1]) % 5:
        with contextlib.suppress(FileNotFoundError):
            cache.folder({KIND!r}, {KEY!r}).joinpath("kernel.cu").write_text("damaged")
    cache.write({KIND!r}, {KEY!r}, files)
    found = cache.read({KIND!r}, {KEY!r})
    if found is not None:
        assert found == {{n: x.encode() if isinstance(x, str) else x for n, x in files.items()}}
        seen += 1
print(seen)
"""


def test_eight_processes_on_one_key(home):
    """All write and read one entry, and each damages it now and then."""
    writers = []
    for i in range(WRITERS):
        environment = {**os.environ, "FA3_CACHE_DIR": str(home), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", AT_ONCE, str(i)]
        writers.append(
            subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )  # fmt: skip
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    seen = 0
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        out, error = writer.communicate(timeout=120)
        assert writer.returncode == 0, error
        seen += int(out)
    cache.write(KIND, KEY, FILES)
    assert holds()
    assert [p.name for p in entry(home).parent.iterdir() if p.name.startswith(f".{KEY}-")] == []
    print(f"{WRITERS * WRITES} writes by {WRITERS} processes, {seen} whole reads, none damaged")


# ---- damage ----


def test_every_byte_matters(home):
    """One byte of each file changed, at the ends and at random places."""
    cache.write(KIND, KEY, FILES)
    rng, count = random.Random(0), 0
    for path in sorted(entry(home).iterdir()):
        whole = path.read_bytes()
        places = {0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(30))}
        for at in places:
            damaged = bytearray(whole)
            damaged[at] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            # White space of the manifest may change: what it says may not.
            harmless = path.name == cache.MANIFEST and _says_the_same(damaged, whole)
            assert cache.valid(KIND, KEY) == harmless, (path.name, at)
            cache.write(KIND, KEY, FILES)
            assert holds()
            path.write_bytes(whole)
            count += 1
    print(f"{count} bytes changed one at a time")


def _says_the_same(damaged: bytes, whole: bytes) -> bool:
    try:
        return json.loads(damaged) == json.loads(whole)
    except ValueError:
        return False


def test_every_truncation_is_seen(home):
    cache.write(KIND, KEY, FILES)
    count = 0
    for path in sorted(entry(home).iterdir()):
        whole = path.read_bytes()
        for length in range(0, len(whole), max(1, len(whole) // 40)):
            path.write_bytes(whole[:length])
            assert not cache.valid(KIND, KEY), (path.name, length)
            count += 1
        path.unlink()
        assert not cache.valid(KIND, KEY)
        cache.write(KIND, KEY, FILES)
        assert holds()
    print(f"{count} truncations")


@pytest.mark.parametrize(
    "manifest",
    ["", "null", "[]", "{}", "7", '{"kernel.cu": 7}', '{"kernel.cu": null}', '{"../../x": "00"}',
     '{"/etc/passwd": "00"}', '{"": "00"}', '{"\\u0000": "00"}', "[" * 100000],
)  # fmt: skip
def test_a_manifest_that_nobody_wrote_is_a_missing_entry(home, manifest):
    cache.write(KIND, KEY, FILES)
    (entry(home) / cache.MANIFEST).write_text(manifest)
    assert cache.read(KIND, KEY) is None
    cache.write(KIND, KEY, FILES)
    assert holds()


@pytest.mark.parametrize("what", ["file", "link", "dangling link", "folder"])
def test_something_else_in_the_place_of_an_entry_or_a_file(home, tmp_path, what):
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    for place in (entry(home), entry(home) / "kernel.cu"):
        cache.write(KIND, KEY, FILES)
        _remove(place)
        if what == "file":
            place.write_text("in the way")
        elif what == "folder":
            (place / "deeper").mkdir(parents=True)
        else:
            place.symlink_to(other if what == "link" else tmp_path / "nowhere")
        assert cache.read(KIND, KEY) is None
        cache.write(KIND, KEY, FILES)
        assert holds()
        assert not entry(home).is_symlink()
    assert (other / "mine.txt").read_text() == "mine"


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_the_cache_is_cleared_during_a_write(home, monkeypatch):
    """Or a process whose clock is ahead sweeps the writer's folder away."""
    make = tempfile.mkdtemp
    cleared = []

    def cleared_once(**options) -> str:
        made = make(**options)
        if not cleared:
            shutil.rmtree(home)
            cleared.append(made)
        return made

    monkeypatch.setattr(cache.tempfile, "mkdtemp", cleared_once)
    cache.write(KIND, KEY, FILES)
    assert cleared and holds() and cache.root() == home


# ---- forked processes ----


def test_a_lock_is_not_held_by_who_was_forked_under_it(home):
    with cache.lock(KIND, KEY):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        code = f"from fa3_compile.lower.binaries import cache\nwith cache.lock({KIND!r}, {KEY!r}): print(1)"
        assert python(code, home).communicate(timeout=30)[0] == b"1\n"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


FORKED = """
import os, sys
from fa3_compile.lower.binaries import cache
own = cache._own("a test")
child = os.fork()
if child:
    os.waitpid(child, 0)
    print(own.is_dir(), own)
"""


def test_a_forked_process_leaves_the_other_its_folder(home):
    out, _ = python(FORKED, home).communicate(timeout=60)
    exists, own = out.decode().split()
    assert exists == "True" and not Path(own).exists()


def test_what_is_remembered_of_a_spec_is_asked_once(home):
    """In all processes; anew where the entry is damaged."""
    asked = []

    def shortest(spec: AttentionSpec) -> str | None:
        asked.append(str(spec))
        return None if spec.has_mask else "no mask"

    specs = [AttentionSpec.parse(x) for x in ("attention(score=s)", "attention(score=2.0*s)")]
    for _ in range(2):  # a process each
        found = remembered(shortest)
        assert [found(x) for x in (*specs, *specs)] == ["no mask"] * 4
    assert len(asked) == 2
    for path in (home / "remembered").glob("*/answer.json"):
        path.write_text("true")
    assert remembered(shortest)(specs[0]) == "no mask" and len(asked) == 3
