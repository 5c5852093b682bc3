import pytest

from fa3_compile.lower.binaries import cache


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache of its own, whatever the process used before."""
    monkeypatch.setenv("FA3_CACHE_DIR", str(tmp_path / "fa3"))
    monkeypatch.setattr(cache, "_elsewhere", None)
    cache._private.cache_clear()
    yield tmp_path / "fa3"
    cache._private.cache_clear()
