"""The cache on disk under everything that happens to caches.

What is asked each time: nobody ever reads an entry that is not exactly as somebody wrote it, and
whoever needs a kernel gets one. The tests print how many times each thing was done (pytest -rP).
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from fa3_compile.lower.binaries import cache
from fa3_compile.lower.binaries.remembered import remembered
from fa3_compile.spec.attention import AttentionSpec

ROOT = Path(__file__).parents[2]
KIND, KEY = "cuda", "0123456789abcdef"
FILES = {"kernel.cu": "__global__ void f() {}\n" * 40, "kernel.cubin": bytes(range(256)) * 64}
KILLS, WRITERS, WRITES = 25, 8, 40
AS_ROOT, NOBODY = os.getuid() == 0, 65534


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache of its own, whatever the process used before."""
    monkeypatch.setenv("FA3_CACHE_DIR", str(tmp_path / "fa3"))
    monkeypatch.setattr(cache, "_elsewhere", None)
    cache._private.cache_clear()
    yield tmp_path / "fa3"
    cache._private.cache_clear()


def entry(home: Path) -> Path:
    return home / KIND / KEY


def holds(files=FILES) -> bool:
    found = cache.read(KIND, KEY)
    wanted = {n: x.encode() if isinstance(x, str) else x for n, x in files.items()}
    return found == wanted


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


# ---- a disk that is full, a folder that is not ours ----


def test_no_file_may_grow(home, caplog):
    """RLIMIT_FSIZE stands for a full disk: the write fails, nothing half-written stays, and the
    entry goes where there is room."""
    cache.write(KIND, "another", {"kernel.cu": "small"})
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, old[1]))
        with pytest.raises(OSError):
            cache.write(KIND, KEY, FILES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert not entry(home).exists()
    assert [p for p in entry(home).parent.iterdir() if p.name.startswith(f".{KEY}-")] == []
    cache.write(KIND, KEY, FILES)
    assert holds()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB, where one may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k,mode=0700", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount here")
    if done.returncode:
        pytest.skip("no file system may be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(small_disk, monkeypatch):
    """Entries are written until the disk is full: from then on they lie in a folder of this
    process, and are read back from there."""
    monkeypatch.setenv("FA3_CACHE_DIR", str(small_disk / "fa3"))
    monkeypatch.setattr(cache, "_elsewhere", None)
    cache._private.cache_clear()
    count = 24
    for i in range(count):
        cache.write(KIND, f"key{i}", FILES)
        assert cache.read(KIND, f"key{i}") is not None, i
    assert not cache.root().is_relative_to(small_disk)
    assert stat.S_IMODE(cache.root().stat().st_mode) == 0o700
    cache._private.cache_clear()
    print(f"{count} entries of 17 KiB on a disk of 256 KiB")


def test_a_kernel_is_built_on_a_full_disk(home, monkeypatch):
    from fa3_compile.lower.binaries import build_nvrtc

    class Key:
        digest, spec, config = "d" * 16, "spec", cache_config()

        def source(self):
            return "source"

    built = build_nvrtc.Built(b"cubin", "log", 32, 0, False)
    monkeypatch.setattr(build_nvrtc, "build", lambda source, headers: built)
    monkeypatch.setattr(build_nvrtc, "compiler", lambda: "(13, 0)")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.tempfile, "mkdtemp", full)
    build_nvrtc.load.cache_clear()
    assert build_nvrtc.load(Key()) == built
    build_nvrtc.load.cache_clear()


def test_kernels_are_built_where_no_thread_can_be_started(monkeypatch):
    from fa3_compile.lower.binaries import build_nvrtc

    def submit(*_):
        raise RuntimeError("cannot schedule new futures after shutdown")

    monkeypatch.setattr(build_nvrtc.ThreadPoolExecutor, "submit", submit)
    monkeypatch.setattr(build_nvrtc, "load", lambda key: key)
    assert build_nvrtc._attempts([1, 2, 3]) == [1, 2, 3]  # pyright: ignore


def cache_config():
    from fa3_compile.lower.tiles.config_sm90 import Sm90Config

    return Sm90Config(64, 64)


def test_the_root_is_private_to_its_user(home):
    assert stat.S_IMODE(cache.root().stat().st_mode) == 0o700
    cache._private.cache_clear()
    home.chmod(0o777)
    assert cache.root() == home
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_a_root_of_somebody_else_is_not_used(home):
    if not AS_ROOT:
        pytest.skip("only root can give a folder away")
    home.mkdir()
    os.chown(home, 12345, -1)
    _is_elsewhere(home)


def test_a_root_that_is_a_link_is_not_used(home, tmp_path):
    (tmp_path / "target").mkdir(mode=0o700)
    home.symlink_to(tmp_path / "target")
    _is_elsewhere(home)
    assert list((tmp_path / "target").iterdir()) == []


def test_a_root_that_is_a_file_is_not_used(home):
    home.write_text("a file")
    _is_elsewhere(home)


def test_a_read_only_root_is_not_used(monkeypatch):
    """In a process that is not root, since root may write everywhere."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        home = Path(folder) / "fa3"
        home.mkdir(mode=0o500)
        if AS_ROOT:
            os.chown(home, NOBODY, -1)
        monkeypatch.setenv("FA3_CACHE_DIR", str(home))
        cache._private.cache_clear()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if AS_ROOT:
                    os.setuid(NOBODY)
                _is_elsewhere(home)
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert list(home.iterdir()) == []
    cache._private.cache_clear()


@pytest.mark.parametrize("configured", ["~/fa3", ""], ids=["no home", "no name"])
def test_a_user_without_a_home_or_a_name(home, monkeypatch, configured):
    def unknown(*_):
        raise KeyError("getpwuid(): uid not found: 54321")

    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FA3_CACHE_DIR", configured)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    _is_elsewhere(home)


def test_a_relative_root_stays_where_it_was(home, monkeypatch, tmp_path):
    monkeypatch.setenv("FA3_CACHE_DIR", "fa3")
    monkeypatch.chdir(tmp_path)
    cache.write(KIND, KEY, FILES)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert holds() and cache.root() == home


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


def _is_elsewhere(home: Path) -> None:
    """Entries are kept, privately, but not at `home`."""
    own = cache.root()
    assert not own.is_relative_to(home)
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert own.stat().st_uid == os.getuid()
    cache.write(KIND, KEY, FILES)
    assert holds()
    assert cache.root() == own


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
