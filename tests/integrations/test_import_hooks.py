"""Patches on a library that somebody imports before us, after us, or never."""

import importlib
import sys

import pytest

from tp_plugin.integrations.import_hooks import AfterImport


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A package on the path that is not imported yet."""
    package = tmp_path / "somebodys"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "somebodys.inner"
    for name in ("somebodys", "somebodys.inner"):
        sys.modules.pop(name, None)


@pytest.fixture
def waiting(library):
    calls = []
    made = AfterImport({library: lambda module: calls.append(module.value)})
    made.calls = calls
    yield made
    made.uninstall()
    assert made not in sys.meta_path


def test_what_is_imported_already_is_served_at_once(library, waiting):
    importlib.import_module(library)
    waiting.install()
    assert waiting.calls == [1]


def test_what_is_imported_later_is_served_when_it_is_complete_and_once(library, waiting):
    waiting.install()
    importlib.import_module("somebodys")
    assert waiting.calls == []
    module = importlib.import_module(library)
    assert waiting.calls == [1]
    importlib.reload(module)
    assert waiting.calls == [1]
    assert module.__loader__.get_source(library) == "value = 1\n"


def test_what_it_raises_is_raised_by_the_import(library):
    def refuse(module):
        raise ValueError("not this version")

    waiting = AfterImport({library: refuse})
    waiting.install()
    try:
        with pytest.raises(ValueError, match="not this version"):
            importlib.import_module(library)
        assert library not in sys.modules
    finally:
        waiting.uninstall()


def test_nobody_waits_after_uninstall(library, waiting):
    waiting.install()
    waiting.uninstall()
    importlib.import_module(library)
    assert waiting.calls == []
