"""Upstream: names of other libraries, each declared once; checks, replacements and documentation follow from it."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from types import FunctionType, ModuleType
from typing import Any, TypeVar

from tp_plugin.integrations.contract import NameMoved, Patches, contract, full_name
from tp_plugin.integrations.features import Feature
from tp_plugin.integrations.versions import is_before

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Name:
    """A name of another library that a file of ours relies on.

    Attributes:
        owner: the module or class that has it; "module:Class" for one that some versions lack, or that is not to be
            imported before it is checked.
        name, parameters, why: see :func:`tp_plugin.integrations.contract.contract`.
        make: our replacement, made of the raw attribute (see :meth:`Patches.replace`); None leaves the original.
        since: the first version that has it, where older ones need none; "" where all must have it.
        until: the first version that needs none; "" where all do.
        older: parameters that earlier versions take, which are served too.
        everywhere: modules that have imported the original by its name get the replacement, too.
    """

    owner: Any
    name: str
    parameters: Sequence[str] | None
    why: str
    make: Callable[[Any], Any] | None = None
    since: str = ""
    until: str = ""
    older: tuple[Sequence[str], ...] = ()
    everywhere: bool = False

    @property
    def where(self) -> str:
        """Full name of the owner."""
        return self.owner.replace(":", ".") if isinstance(self.owner, str) else full_name(self.owner)

    def place(self) -> Any:
        """The owner. Raises NameMoved if an owner given as text is not there."""
        if not isinstance(self.owner, str):
            return self.owner
        module, _, kind = self.owner.partition(":")
        try:
            found: Any = importlib.import_module(module)
            return getattr(found, kind) if kind else found
        except (ImportError, AttributeError):
            raise NameMoved(f"{self.where} is gone ({self.why})") from None

    def is_left_out(self) -> bool:
        """Return True if the installed version needs none."""
        library = self.where.split(".")[0]
        too_old = bool(self.since) and is_before(library, self.since)
        return too_old or (bool(self.until) and not is_before(library, self.until))

    def check(self) -> None:
        """Raise NameMoved if it is not as declared."""
        if self.is_left_out():
            return
        try:
            contract(self.place(), self.name, self.parameters, self.why)
        except NameMoved:
            for parameters in self.older:
                try:
                    contract(self.place(), self.name, parameters, self.why)
                except NameMoved:
                    continue
                return
            raise

    def replace(self, patches: Patches, make: Callable[[Any], Any]) -> None:
        """Replace the attribute by ``make`` of it."""
        place = self.place()
        if self.everywhere:
            original = vars(place)[self.name]
            for module in list(sys.modules.values()):
                if module is not place and isinstance(module, ModuleType) and vars(module).get(self.name) is original:
                    patches.replace(module, self.name, make)
        patches.replace(place, self.name, make)


class Upstream:
    """Names of other libraries that one file of ours relies on, each declared once, with what replaces it.

    Nothing is checked or replaced before :meth:`moved` and :meth:`install`::

        upstream = Upstream(TRAINER)
        upstream.needs(Trainer, "create_optimizer", ["model"], "a Trainer's own is looked for")

        @upstream.patch(Trainer, "get_tp_size", [], "it says how often a token is counted")
        def _get_tp_size(original, self):
            return 1 if tp_size() > 1 else original(self)

    Args:
        feature: the use of the plugin that is refused while one of the names has moved.
    """

    def __init__(self, feature: Feature) -> None:
        self.feature = feature
        self.names: list[Name] = []
        self._checks: list[Callable[[], None]] = []
        self._last: list[Callable[[], None]] = []

    def needs(
        self, owner: Any, name: str, parameters: Sequence[str] | None = None, why: str = "", **versions: Any
    ) -> None:
        """Declare a name that we use as it is; arguments as of :class:`Name`."""
        self.names.append(Name(owner, name, parameters, why, **versions))

    def patch(
        self, owner: Any, name: str, parameters: Sequence[str] | None = None, why: str = "", **versions: Any
    ) -> Callable[[Function], Function]:
        """Declare that calls of ``owner.name`` go to the decorated function, which takes the original first.

        Class methods, static methods and properties stay what they are; a property's original is its getter.
        """

        def declare(ours: Function) -> Function:
            self.replace(owner, name, parameters, why, make=functools.partial(around, ours), **versions)
            return ours

        return declare

    def replace(
        self,
        owner: Any,
        name: str,
        parameters: Sequence[str] | None,
        why: str,
        make: Callable[[Any], Any],
        **versions: Any,
    ) -> None:
        """Declare that ``owner.name`` becomes ``make(original)``, as in :meth:`Patches.replace`."""
        self.names.append(Name(owner, name, parameters, why, make, **versions))

    def also(self, check: Function) -> Function:
        """Have :meth:`moved` call the decorated function, which raises NameMoved."""
        self._checks.append(check)
        return check

    def then(self, last: Function) -> Function:
        """Have :meth:`install` call the decorated function, which may be called again, after the replacements."""
        self._last.append(last)
        return last

    def moved(self) -> list[str]:
        """Every declared name that has moved, each with its use."""
        found = []
        for check in (*(name.check for name in self.names), *self._checks):
            try:
                check()
            except NameMoved as moved:
                found.append(str(moved))
        return found

    def install(self, patches: Patches) -> None:
        """Replace what was declared to be replaced."""
        for name in self.names:
            if name.make is not None and not name.is_left_out():
                name.replace(patches, name.make)
        for last in self._last:
            last()

    def refuse(self, patches: Patches, in_use: Callable[[], bool]) -> None:
        """Let functions that we would replace raise, where ``in_use()``, instead; those that are still there."""
        for name in self.names:
            if name.make is not None:
                refuse_at(patches, self.feature, name.owner, name.name, in_use)


def refuse_at(patches: Patches, feature: Feature, owner: Any, name: str, in_use: Callable[[], bool]) -> None:
    """Let ``owner.name``, if it is a function or a property, raise the error of a broken ``feature`` where in use."""
    try:
        place = Name(owner, name, None, "").place()
        raw = inspect.getattr_static(place, name)
    except (NameMoved, AttributeError):
        return
    if isinstance(raw, FunctionType | classmethod | staticmethod | property):

        def refused(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if in_use():
                feature.require()
            return original(*args, **kwargs)

        patches.replace(place, name, functools.partial(around, refused))


def around(ours: Callable[..., Any], raw: Any) -> Any:
    """A function, method or property like ``raw`` that calls ``ours`` with the original before its arguments."""
    if isinstance(raw, classmethod | staticmethod):
        return type(raw)(around(ours, raw.__func__))
    if isinstance(raw, property):
        return property(around(ours, raw.fget), raw.fset, raw.fdel)

    @functools.wraps(raw)
    def patched(*args: Any, **kwargs: Any) -> Any:
        return ours(raw, *args, **kwargs)

    return patched
