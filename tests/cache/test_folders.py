"""The cache where its folder is not to be had: a full disk, a root of somebody else, no home."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest

from fa3_compile.lower.binaries import cache
from tests.cache.entry import FILES, KEY, KIND, entry, holds

AS_ROOT, NOBODY = os.getuid() == 0, 65534


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


def _is_elsewhere(home: Path) -> None:
    """Entries are kept, privately, but not at `home`."""
    own = cache.root()
    assert not own.is_relative_to(home)
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert own.stat().st_uid == os.getuid()
    cache.write(KIND, KEY, FILES)
    assert holds()
    assert cache.root() == own
