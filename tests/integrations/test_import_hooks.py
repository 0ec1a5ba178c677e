"""Patches on a library that somebody imports before us, after us, or never."""

import importlib
import sys

import pytest

from tp_plugin.integrations.import_hooks import AfterImport, BetweenImports


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


# ---- between imports -------------------------------------------------------------------------------------------------


@pytest.fixture
def nested(tmp_path, monkeypatch):
    """Packages of which one imports a module of the other half-way."""
    for name, text in {
        "outer/__init__.py": "",
        "outer/early.py": "import inner.trainer\nvalue = 1\n",
        "outer/broken.py": "import inner.trainer\nraise OSError('half of it')\n",
        "inner/__init__.py": "",
        "inner/trainer.py": "value = 2\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    calls = []
    waiting = BetweenImports(["inner.trainer"], ["inner", "outer"], lambda: calls.append(sorted(sys.modules)))
    waiting.install()
    yield calls
    waiting.uninstall()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("inner", "outer")]:
        del sys.modules[name]


def test_the_call_waits_until_no_import_is_under_way(nested):
    module = importlib.import_module("outer.early")
    assert len(nested) == 1
    assert module.value == 1
    assert {"outer.early", "inner.trainer"} <= set(nested[0])
    assert module.__loader__.__class__.__name__ == "SourceFileLoader"
    assert module.__spec__.loader is module.__loader__
    importlib.import_module("outer")
    importlib.reload(sys.modules["inner.trainer"])
    assert len(nested) == 1


def test_an_import_that_fails_is_followed_by_the_next(nested):
    with pytest.raises(OSError, match="half of it"):
        importlib.import_module("outer.broken")
    assert nested == []
    importlib.import_module("outer.early")
    assert len(nested) == 1


def test_other_modules_do_not_count(nested):
    importlib.import_module("outer")
    importlib.import_module("inner")
    assert nested == []


def test_both_kinds_wait_for_one_module(nested):
    patched = []
    after = AfterImport({"inner.trainer": patched.append})
    after.install()
    try:
        module = importlib.import_module("outer.early")
    finally:
        after.uninstall()
    assert patched == [sys.modules["inner.trainer"]]
    assert len(nested) == 1
    assert module.value == 1
