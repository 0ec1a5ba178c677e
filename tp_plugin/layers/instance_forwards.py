"""Forwards set on an instance: they hide the forward of the module's class, and may keep it as a bound method."""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn

from tp_plugin.errors import TensorParallelError

_DEPTH = 4  # of functions that wrap functions
Other = Callable[[Any], Any]
"""Returns the replacement of a value, or the value itself."""


def become(module: nn.Module, kind: type[nn.Module], *, hideable: bool = False) -> None:
    """Change the class of ``module``; a forward kept on the instance, bound or wrapped, becomes the new class's.

    Args:
        hideable: the new class's forward computes what the old one's does, so a forward on the instance may hide it.

    Raises:
        TensorParallelError: a forward set on the instance would hide the new class's; see :func:`hides`.
    """
    if not hideable and hides(module):
        raise TensorParallelError(hidden(type(module).__name__))
    old, new = _bound(module), kind.forward
    module.__class__ = kind

    def other(value: Any) -> Any:
        return types.MethodType(new, module) if value == old and isinstance(value, types.MethodType) else value

    for name, value in _kept(module).items():
        module.__dict__[name] = moved(value, other)


def hides(module: nn.Module) -> bool:
    """True if a forward on the instance does not call its class's, so that changing the class has no effect."""
    if "forward" not in vars(module):
        return False
    old, found = _bound(module), []

    def other(value: Any) -> Any:
        if isinstance(value, types.MethodType) and value == old:
            found.append(value)
        return value

    for value in _kept(module).values():
        moved(value, other)
    return not found


def hidden(name: str) -> str:
    """Error text for a module whose forward :func:`hides` that of its class."""
    return (
        f"{name!r} has a forward set on the instance that hides the sharded layer's; let it call the bound method, "
        "or set it on the class."
    )


def moved(value: Any, other: Other, depth: int = 0) -> Any:
    """Apply ``other`` to ``value`` and its parts: bound methods, closures, partials and plain containers.

    Returns a new object where a part changes; writes into none.
    """
    found = other(value)
    if found is not value or isinstance(value, nn.Module):
        return found
    if isinstance(value, types.MethodType):
        function, owner = moved(value.__func__, other, depth), moved(value.__self__, other, depth)
        return value if function is value.__func__ and owner is value.__self__ else types.MethodType(function, owner)
    if isinstance(value, types.FunctionType):
        return _with_cells_moved(value, other, depth)
    if type(value) is functools.partial:
        function, args, keywords = (moved(part, other, depth) for part in (value.func, value.args, value.keywords))
        return functools.partial(function, *args, **keywords)
    if type(value) in (list, tuple, set):
        return type(value)(moved(item, other, depth) for item in value)
    if type(value) in (dict, OrderedDict):
        return type(value)((name, moved(item, other, depth)) for name, item in value.items())
    return value


def _with_cells_moved(function: types.FunctionType, other: Other, depth: int) -> types.FunctionType:
    """A function whose closure (the modules or methods of a wrapped ``forward``) has the replacements instead."""
    if depth >= _DEPTH or not function.__closure__:
        return function
    cells, changed = [], False
    for cell in function.__closure__:
        try:
            content = cell.cell_contents
        except ValueError:  # not filled yet
            cells.append(cell)
            continue
        found = moved(content, other, depth + 1)
        changed |= found is not content
        cells.append(cell if found is content else types.CellType(found))
    if not changed:
        return function
    made = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(function.__dict__)
    return made


def _bound(module: nn.Module) -> types.MethodType:
    return types.MethodType(type(module).forward, module)


def _kept(module: nn.Module) -> dict[str, Any]:
    """Attributes of the instance that may refer to a forward."""
    kinds = types.MethodType, types.FunctionType, functools.partial
    return {name: value for name, value in vars(module).items() if isinstance(value, kinds)}
