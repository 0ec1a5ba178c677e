"""Assertions for contract tests: sentences that say what moved upstream and which of our files uses it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from tp_plugin.errors import TensorParallelError


def assert_source_has(owner: Any, text: str, why: str) -> None:
    """``owner``'s source still contains ``text`` (white space aside)."""
    source = " ".join(inspect.getsource(inspect.unwrap(owner)).split())
    where = f"{owner.__module__}.{owner.__qualname__}"
    assert " ".join(text.split()) in source, f"{where} no longer contains {text!r}: tp_plugin/integrations/{why}."


def assert_names_are_watched(monkeypatch: pytest.MonkeyPatch, part: Any, owner: Any, name: str) -> None:
    """``part.check_contracts()`` names the attribute when it is gone."""
    monkeypatch.delattr(owner, name)
    with pytest.raises(TensorParallelError, match=rf"\.{name} is gone upstream.*needs it: "):
        part.check_contracts()
