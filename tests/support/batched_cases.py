"""Many small cases in one launch of ranks, each a test of its own: an exception ends its case only."""

from __future__ import annotations

import functools
import importlib
import traceback
from typing import Any

from tests.support.ranks import on_ranks

Modules = str | tuple[str, ...]
"""The module that has the functions, or several, of which the first that has one counts."""


def run_all(modules: Modules, names: list[str], arguments: tuple) -> dict[str, tuple[str, Any]]:
    """One rank's share: name -> ("value", what the function returned) or (the exception's class, its message)."""
    homes = [vars(importlib.import_module(one)) for one in ([modules] if isinstance(modules, str) else modules)]
    found: dict[str, tuple[str, Any]] = {}
    for name in names:
        try:
            found[name] = "value", next(home[name] for home in homes if name in home)(*arguments)
        except Exception as failure:
            traceback.print_exc()
            found[name] = type(failure).__name__, str(failure)
    return found


@functools.cache
def launched(world: int, modules: Modules, names: tuple[str, ...], arguments: tuple = ()) -> list[dict]:
    """``run_all`` on ``world`` ranks, once however many tests ask; one dict a rank."""
    return on_ranks(world, run_all, modules, list(names), arguments, timeout_s=600)


def values(results: list[dict], name: str) -> list[Any]:
    """What each rank returned; fails with the message of one that raised."""
    for rank, found in enumerate(results):
        kind, value = found[name]
        assert kind == "value", f"{name} on rank {rank} raised {kind}: {value}"
    return [found[name][1] for found in results]


def sentence(results: list[dict], name: str, kind: str = "TensorParallelError") -> str:
    """The one sentence that every rank raised, the same on all of them."""
    raised = [found[name] for found in results]
    assert all(found == raised[0] for found in raised), f"{name}: the ranks did not raise alike: {raised}"
    assert raised[0][0] == kind, f"{name} raised {raised[0]}"
    message = raised[0][1]
    assert "\n" not in message
    assert ". " not in message.rstrip("."), f"more than one sentence: {message}"
    return message
