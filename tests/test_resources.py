"""Where the kernel sources are found, and the hash that salts caches with them."""

import pytest

from fa3_compile import resources


def test_a_broken_installation_names_both_places(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "_PACKAGE", tmp_path / "site-packages" / "fa3_compile")
    with pytest.raises(FileNotFoundError, match="installation is incomplete") as caught:
        resources.templates()
    assert str(tmp_path / "site-packages" / "fa3_compile" / "templates") in str(caught.value)


def test_a_strangers_templates_in_site_packages_are_not_ours(tmp_path, monkeypatch):
    (tmp_path / "templates").mkdir()
    monkeypatch.setattr(resources, "_PACKAGE", tmp_path / "fa3_compile")
    with pytest.raises(FileNotFoundError):
        resources.templates()


def test_the_source_hash_changes_with_any_source_and_with_sympy(tmp_path, monkeypatch):
    package = tmp_path / "fa3_compile"
    files = [package / "a.py", package / "templates" / "t.jinja", package / "kernels" / "k.cuh"]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("one")
    monkeypatch.setattr(resources, "_PACKAGE", package)
    hash_now = resources.source_hash.__wrapped__
    seen = {hash_now()}
    for file in files:
        file.write_text("two")
        seen.add(hash_now())
    monkeypatch.setattr(resources.sympy, "__version__", "0")
    seen.add(hash_now())
    assert len(seen) == 5
    assert hash_now() == hash_now()
