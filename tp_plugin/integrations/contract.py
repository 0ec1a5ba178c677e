"""Names of other libraries that we rely on: checked, replaced, and restored.

A private name that has moved would otherwise show as an AttributeError deep in a training run, or not at all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.versions import MOVED


class NameMoved(TensorParallelError):
    """A name of another library is gone or takes other parameters; the text has the name and its use."""


def contract(owner: Any, name: str, parameters: Sequence[str] | None = None, why: str = "") -> Any:
    """The attribute ``owner.name``, once its presence and signature are checked.

    Args:
        owner: the module or class that must have the attribute.
        name: the attribute, possibly private.
        parameters: the names of its leading parameters, in order and without ``self``; parameters that follow must
            have defaults. None does not look at the signature.
        why: our use of it, for the message.

    Raises:
        NameMoved: it is missing, or takes other parameters.
    """
    where = full_name(owner)
    try:
        found = inspect.getattr_static(owner, name)
    except AttributeError:
        raise NameMoved(f"{where}.{name} is gone ({why})") from None
    if parameters is not None:
        actual = _parameters(found)
        names = [parameter.name for parameter in actual]
        extra = actual[len(parameters) :]
        if names[: len(parameters)] != list(parameters) or any(_required(parameter) for parameter in extra):
            raise NameMoved(f"{where}.{name} takes ({', '.join(names)}), not ({', '.join(parameters)}) ({why})")
    return getattr(owner, name)


def full_name(owner: Any) -> str:
    """Name of a module, or of a class with its module."""
    return f"{owner.__module__}.{owner.__qualname__}" if inspect.isclass(owner) else owner.__name__


def _parameters(found: Any) -> list[inspect.Parameter]:
    function: Any = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
    function = inspect.unwrap(function) if callable(function) else function
    actual = list(inspect.signature(function).parameters.values())
    if {parameter.kind for parameter in actual} == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        # a decorator without functools.wraps (DeepSpeed's instrument_w_nvtx): look at the decorated function
        cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        inner = [content for content in cells if inspect.isfunction(content)]
        if len(inner) == 1:
            actual = list(inspect.signature(inner[0]).parameters.values())
    return actual[1:] if actual and actual[0].name in ("self", "cls") else actual


def _required(parameter: inspect.Parameter) -> bool:
    variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not variadic


class Patches:
    """Replaced attributes of other libraries' classes and modules; true if there are any, restored by :meth:`undo`."""

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, bool, Any, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._replaced)

    def replace(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Set ``owner.name`` to ``make(original)``; ``original`` is the raw attribute (a function, a property)."""
        original = inspect.getattr_static(owner, name)
        ours = make(original)
        for place, known in ((owner, name), *([MOVED[owner, name]] if (owner, name) in MOVED else [])):
            own = known in vars(place)
            setattr(place, known, ours)
            self._replaced.append((place, known, own, original, ours))

    def undo(self) -> None:
        """Restore the originals, the latest first; an attribute that others have replaced since is left alone."""
        while self._replaced:
            owner, name, own, original, ours = self._replaced.pop()
            if vars(owner).get(name) is not ours:
                continue
            if own:
                setattr(owner, name, original)
            else:
                delattr(owner, name)
