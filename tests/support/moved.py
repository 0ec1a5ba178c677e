"""Other versions of libraries: what moved upstream and which of our files relies on it, and versions pretended."""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
from collections.abc import Iterator
from typing import Any
from unittest import mock

from tp_plugin.integrations.versions import installed


def assert_source_has(owner: Any, text: str, why: str) -> None:
    """``owner``'s source still contains ``text`` (white space aside)."""
    source = " ".join(inspect.getsource(inspect.unwrap(owner)).split())
    where = f"{owner.__module__}.{owner.__qualname__}"
    assert " ".join(text.split()) in source, f"{where} no longer contains {text!r}: tp_plugin/integrations/{why}."


@contextlib.contextmanager
def pretended(library: str, version: str) -> Iterator[None]:
    """Another version of a library is installed, as its metadata says."""
    true = importlib.metadata.version
    installed.cache_clear()
    try:
        with mock.patch("importlib.metadata.version", lambda name: version if name == library else true(name)):
            yield
    finally:
        installed.cache_clear()
