"""What a test starts, found in its code: ``unit`` (nothing), ``ranks`` (forked ranks) or ``e2e`` (other programs)."""

from __future__ import annotations

import functools
import inspect
import subprocess
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch.distributed as dist

from tests.support import ranks
from tp_plugin.model_check.fork_server import Launch

STARTERS = {
    ranks.outcomes: "ranks",
    Launch: "ranks",
    dist.init_process_group: "ranks",
    subprocess.run: "e2e",
    subprocess.Popen: "e2e",
}
FOLLOWED = ("tests.", "integration.", "conftest", "tp_plugin.model_check")
"""Modules whose functions are looked into."""


def kind_of(functions: list[Any]) -> str:
    """The most that ``functions`` (a test and its fixtures) and what they call can start."""
    seen: dict[int, Any] = {}
    found, todo = {"unit"}, list(functions)
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen[id(one)] = one
        starter = _starter(one)
        if starter:
            found.add(starter)
        else:
            todo += _used_by(one)
    return next(kind for kind in ("e2e", "ranks", "unit") if kind in found)


def _starter(one: Any) -> str | None:
    return next((kind for starter, kind in STARTERS.items() if one is starter), None)


def _used_by(one: Any) -> list[Any]:
    """Globals that a function, or a method of an object's or class's, names."""
    if isinstance(one, functools.partial):
        return [one.func]
    if isinstance(one, staticmethod | classmethod):
        return [one.__func__]
    one = inspect.unwrap(one) if callable(one) else one
    if isinstance(one, FunctionType):
        if not one.__module__.startswith(FOLLOWED):
            return []
        names = list(_names(one.__code__))
        known = [one.__globals__[name] for name in names if name in one.__globals__]
        modules = [value for value in known if isinstance(value, ModuleType)]
        return known + [vars(module)[name] for module in modules for name in names if name in vars(module)]
    owner = one if isinstance(one, type) else type(one)
    if owner.__module__.startswith(FOLLOWED):
        return [value for value in vars(owner).values() if callable(value) or isinstance(value, classmethod)]
    return [value for value in one.values() if callable(value)] if isinstance(one, dict) else []


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
