"""What we rely on in the libraries we plug into, checked, and the patches we lay on them, undone.

A private name that moved would otherwise show as an AttributeError deep in a training run, or not at all.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from packaging.markers import Marker
from packaging.requirements import Requirement

from tp_plugin.errors import TensorParallelError

DISTRIBUTION = "tp-plugin"
PLUGGED_INTO = ("torch", "deepspeed", "accelerate", "transformers")


def contract(owner: Any, name: str, parameters: Sequence[str] | None = None, why: str = "") -> Any:
    """The attribute ``owner.name``, once it is sure to be what we were written against.

    Args:
        owner: the module or class that must have the attribute.
        name: the attribute, possibly private.
        parameters: the names of its leading parameters, in order and without ``self``; parameters that follow must
            have defaults. None does not look at the signature.
        why: where and what for we use it; goes into the message.

    Raises:
        TensorParallelError: it is gone, or takes other parameters.
    """
    where = f"{getattr(owner, '__module__', '')}.{owner.__name__}" if inspect.isclass(owner) else owner.__name__
    library = where.lstrip(".").split(".")[0]
    moved = (
        f"tp_plugin needs it: {why}. {library} {_version(library)} is installed; install a version that "
        f"{DISTRIBUTION} was tested with ({_range(library)})."
    )
    try:
        found = inspect.getattr_static(owner, name)
    except AttributeError:
        raise TensorParallelError(f"{where}.{name} is gone upstream. {moved}") from None
    if parameters is not None:
        actual = _parameters(found)
        names = [parameter.name for parameter in actual]
        extra = actual[len(parameters) :]
        if names[: len(parameters)] != list(parameters) or any(_required(parameter) for parameter in extra):
            raise TensorParallelError(
                f"{where}.{name} takes ({', '.join(names)}) where ({', '.join(parameters)}) was expected. {moved}"
            )
    return getattr(owner, name)


def _parameters(found: Any) -> list[inspect.Parameter]:
    function: Any = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
    actual = list(inspect.signature(function).parameters.values())
    if {parameter.kind for parameter in actual} == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        # a decorator that forgot functools.wraps (DeepSpeed's instrument_w_nvtx): ask what it decorates
        cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        inner = [content for content in cells if inspect.isfunction(content)]
        if len(inner) == 1:
            actual = list(inspect.signature(inner[0]).parameters.values())
    return actual[1:] if actual and actual[0].name in ("self", "cls") else actual


def _required(parameter: inspect.Parameter) -> bool:
    variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not variadic


def check_versions() -> None:
    """Refuse versions of torch, DeepSpeed, accelerate and transformers outside the ranges of our package metadata.

    Raises:
        TensorParallelError: one sentence that lists every library out of range, what is installed and what to install.
    """
    wrong = []
    for name in PLUGGED_INTO:
        requirement, installed = _requirement(name), _version(name)
        if requirement is not None and not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{name} {installed} (supported: {requirement.specifier})")
    if wrong:
        fix = " ".join(f"'{_requirement(text.split()[0])}'" for text in wrong)
        raise TensorParallelError(
            f"tp_plugin reaches into private parts of these libraries and was not tested with {', '.join(wrong)}; "
            f"run: pip install {fix}"
        )


def out_of_range(name: str, extra: str) -> str | None:
    """Why the installed version of a library that only ``extra`` asks for is none we know; None if it is."""
    requirement, installed = _requirement(name, extra), _version(name)
    if requirement is None or requirement.specifier.contains(installed, prereleases=True):
        return None
    return (
        f"tp_plugin was not tested with {name} {installed} (supported: {requirement.specifier}); run: pip install "
        f"'{name}{requirement.specifier}'"
    )


def _requirement(name: str, extra: str | None = None) -> Requirement | None:
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return None
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        asked = marker is None or "extra" not in str(marker) if extra is None else _is_of(marker, extra)
        if requirement.name == name and asked:
            return requirement
    return None


def _is_of(marker: Marker | None, extra: str) -> bool:
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def _range(name: str) -> str:
    requirement = _requirement(name)
    return str(requirement) if requirement else f"see the dependencies of {DISTRIBUTION}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(unknown version)"


class Patches:
    """Attributes of foreign classes and modules replaced by ours, and put back by :meth:`undo`.

    Idempotent through its user: ``if patches: return``.
    """

    def __init__(self) -> None:
        self._laid: list[tuple[Any, str, bool, Any, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._laid)

    def replace(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Set ``owner.name`` to ``make(original)``; ``original`` is the raw attribute (a function, a property)."""
        own = name in vars(owner)
        original = inspect.getattr_static(owner, name)
        ours = make(original)
        setattr(owner, name, ours)
        self._laid.append((owner, name, own, original, ours))

    def undo(self) -> None:
        """Put the originals back, the latest first. What somebody has patched over since is left as it is."""
        while self._laid:
            owner, name, own, original, ours = self._laid.pop()
            if vars(owner).get(name) is not ours:
                continue
            if own:
                setattr(owner, name, original)
            else:
                delattr(owner, name)
