"""Snapshot of the state that a step can change, and of the places that hold a model.

The guard runs a user's loss several times. The loss may advance a counter, a queue of negatives, a buffer or a random
generator. Its runs would then differ, and training would start from an advanced state.
"""

from __future__ import annotations

import functools
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from tp_plugin.partitioned import is_partitioned
from tp_plugin.step_guard.user_objects import (
    LARGEST,
    counter,
    entries,
    is_opaque,
    is_structure,
    is_users,
    names_of,
    replaced,
    same,
    undo_of,
)

LEFT_ALONE = ["tp_"]
"""Prefixes of attributes of modules that belong to libraries; integrations add theirs."""
LARGEST_WEIGHT = 1 << 20  # bytes; a loss may change a smaller parameter, such as its temperature
ON_DEVICE = 64 << 20  # bytes; the copy of a larger tensor is in host memory
_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, types.ModuleType, slice)
_MISSING = object()

Places = Iterable[tuple[Any, Callable[[Any], object]]]
"""(a value, a setter that puts another value in its place)."""


class StateSnapshot:
    """Present state of all objects that can be reached from some.

    It walks attributes, containers and closures. Of functions and classes outside of installed packages it also walks
    the global names they use and the class attributes. State in files, extensions or running Python generators is not
    seen.

    Args:
        roots: a trainer, a loss, a function; walked even if they belong to a library.
        models: walked first; :meth:`replace` leaves their own structure as it is.
    """

    def __init__(self, roots: Iterable[Any], models: Iterable[nn.Module] = ()) -> None:
        self._seen: dict[int, Any] = {}  # by id, and alive
        self._undo: list[Callable[[], object]] = []
        self._places: list[Callable[[], Places]] = []
        self._waiting: deque[Any] = deque()
        self._classes: set[type] = set()
        modules = [module for model in models for module in model.modules()]
        self._own = {id(module) for module in modules}
        self._weights = {id(param) for module in modules for param in dict.values(vars(module)["_parameters"])}
        for model in models:
            self._waiting.append(model)
            self._walk()
        self._places.clear()  # a model's own structure stays
        for root in roots:
            if isinstance(root, types.FunctionType):
                self._waiting.append(root)
            elif id(root) not in self._seen and root is not None:
                self._seen[id(root)] = root
                self._attributes(root)
        self._walk()

    def put_back(self) -> None:
        """Restore the state of when this was made."""
        for undo in self._undo:
            undo()

    def replace(self, by: Mapping[int, Any]) -> None:
        """Put ``by[id(x)]`` in the places of ``x``, but not inside the models; undone by :meth:`put_back`."""
        for places in self._places:
            for value, put in places():
                other = replaced(value, by)
                if other is not value:
                    put(other)

    def _walk(self) -> None:
        while self._waiting:
            value = self._waiting.popleft()
            if not isinstance(value, _ATOMS) and id(value) not in self._seen and len(self._seen) < LARGEST:
                self._seen[id(value)] = value
                self._visit(value)

    def _visit(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._tensor(value)
        elif isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, dict | list | deque | set):
            self._container(value)
        elif isinstance(value, tuple | frozenset):
            self._waiting.extend(value if len(value) <= LARGEST else ())
        elif isinstance(value, functools.partial):
            self._waiting.extend((value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            self._waiting.extend((value.__self__, value.__func__))
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, staticmethod | classmethod):
            self._waiting.append(value.__func__)
        elif isinstance(value, property):
            self._waiting.append(value.fget)
        elif isinstance(value, type):
            self._class(value)
        elif not self._has_own_state(value) and not is_opaque(value):
            self._attributes(value)

    def _tensor(self, tensor: torch.Tensor) -> None:
        plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta
        large = isinstance(tensor, nn.Parameter) and tensor.nbytes > LARGEST_WEIGHT  # such as a teacher's
        if not plain or large or id(tensor) in self._weights or is_partitioned(tensor):
            return
        held = tensor.detach()
        kept = held.cpu() if held.nbytes > ON_DEVICE and not held.is_cpu else held.clone()

        def undo() -> None:
            now = tensor.data
            if now.shape != kept.shape or now.dtype != kept.dtype:
                tensor.data = kept.to(now.device, copy=True)
            elif not torch.equal(now, kept.to(now.device)):
                now.copy_(kept)

        self._undo.append(undo)

    def _has_own_state(self, value: Any) -> bool:
        known, undo = undo_of(value)
        self._undo += [] if undo is None else [undo]
        return known

    def _container(self, value: Any) -> None:
        if len(value) <= LARGEST:
            (self._dict if isinstance(value, dict) else self._items)(value)
        if getattr(value, "__dict__", None) and not is_opaque(value):
            self._attributes(value)

    def _dict(self, held: dict[Any, Any]) -> None:
        before = entries(held)

        def undo() -> None:
            if not same(held, before):
                held.clear()
                held.update(entries(before))

        self._undo.append(undo)
        self._places.append(lambda: [(v, functools.partial(held.__setitem__, k)) for k, v in list(dict.items(held))])
        self._waiting.extend(before.values())

    def _items(self, held: Any) -> None:
        """Entries of a list, a queue or a set."""
        before, add = [counter(value) for value in held], held.update if isinstance(held, set) else held.extend

        def undo() -> None:
            if len(held) != len(before) or any(a is not b for a, b in zip(held, before, strict=True)):
                held.clear()
                add(map(counter, before))

        self._undo.append(undo)
        if not isinstance(held, set):
            self._places.append(lambda: [(v, functools.partial(held.__setitem__, k)) for k, v in enumerate(list(held))])
        self._waiting.extend(before)

    def _module(self, module: nn.Module) -> None:
        if type(module).__module__.split(".")[0] in ("deepspeed", "accelerate") and id(module) not in self._own:
            return  # an engine; the module it wraps is among the models
        self._names(vars(module), leave=lambda name: is_structure(name) or name.startswith(tuple(LEFT_ALONE)))
        for parts in ("_buffers", "_modules", "_parameters"):
            held = vars(module)[parts]
            if id(module) not in self._own or parts == "_buffers":
                self._dict_once(held)
            else:
                self._waiting.extend(dict.values(held) if parts == "_modules" else ())
        self._waiting.append(type(module))

    def _dict_once(self, held: Any) -> None:
        if isinstance(held, dict) and id(held) not in self._seen:
            self._seen[id(held)] = held
            self._dict(held)

    def _attributes(self, value: Any) -> None:
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict) and len(attributes) <= LARGEST:
            self._names(attributes)
        for kind in type(value).__mro__:
            slots = vars(kind).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if not name.startswith("__") and hasattr(value, name):
                    self._slot(value, name)
        self._waiting.append(type(value))

    def _slot(self, value: Any, name: str) -> None:
        before = counter(getattr(value, name))

        def undo() -> None:
            if getattr(value, name, None) is not before:
                setattr(value, name, counter(before))

        self._undo.append(undo)
        self._places.append(lambda: [(getattr(value, name, None), functools.partial(setattr, value, name))])
        self._waiting.append(before)

    def _names(self, names: dict[str, Any], leave: Callable[[str], bool] = lambda _: False) -> None:
        """Attributes by name; undoing removes those that were added."""
        before = {name: counter(value) for name, value in names.items() if not leave(name)}

        def undo() -> None:
            for name in [name for name in names if name not in before and not leave(name)]:
                del names[name]
            names.update({name: counter(value) for name, value in before.items() if names.get(name) is not value})

        def places() -> Places:
            return [(v, functools.partial(names.__setitem__, k)) for k, v in list(names.items()) if not leave(k)]

        self._undo.append(undo)
        self._places.append(places)
        self._waiting.extend(before.values())

    def _function(self, function: types.FunctionType) -> None:
        self._waiting.extend((function.__defaults__, function.__kwdefaults__, getattr(function, "__wrapped__", None)))
        for cell in function.__closure__ or ():
            self._cell(cell)
        if is_users(function.__code__.co_filename):
            self._names(vars(function))
            used = set(names_of(function.__code__))
            self._some(function.__globals__, used)
            for value in [function.__globals__.get(name) for name in used]:
                if isinstance(value, types.ModuleType) and is_users(getattr(value, "__file__", None) or "<frozen"):
                    self._some(vars(value), used & vars(value).keys())

    def _cell(self, cell: types.CellType) -> None:
        try:
            before = cell.cell_contents
        except ValueError:  # not filled yet
            return
        if id(cell) in self._seen:
            return
        self._seen[id(cell)] = cell
        kept = counter(before)
        self._undo.append(lambda: setattr(cell, "cell_contents", counter(kept)))
        self._places.append(lambda: [(cell.cell_contents, functools.partial(setattr, cell, "cell_contents"))])
        self._waiting.append(before)

    def _some(self, names: dict[str, Any], used: set[str]) -> None:
        """Those entries of ``names`` that a function uses."""
        before = {name: counter(names.get(name, _MISSING)) for name in used}

        def undo() -> None:
            for name, value in before.items():
                if value is _MISSING:
                    names.pop(name, None)
                elif names.get(name) is not value:
                    names[name] = counter(value)

        self._undo.append(undo)
        self._places.append(lambda: [(names[k], functools.partial(names.__setitem__, k)) for k in used if k in names])
        self._waiting.extend(value for value in before.values() if value is not _MISSING)

    def _class(self, kind: type) -> None:
        """Attributes of the class itself, and its functions, which may use global names."""
        for one in set(kind.__mro__) - self._classes:
            self._classes.add(one)
            file = getattr(sys.modules.get(one.__module__), "__file__", None)
            if one.__module__ != "__main__" and (file is None or not is_users(file)):
                continue
            for name, value in list(vars(one).items()):
                if name.startswith("__"):
                    continue
                if isinstance(value, types.FunctionType | staticmethod | classmethod | property):
                    self._waiting.append(value)
                elif not hasattr(type(value), "__get__"):
                    self._slot(one, name)
