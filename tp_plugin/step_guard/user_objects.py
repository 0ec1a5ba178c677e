"""Tell which objects of a user's have state to walk; replace an object inside of immutable ones."""

from __future__ import annotations

import copy
import functools
import itertools
import random
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

OPAQUE = {
    *("torch", "transformers", "accelerate", "deepspeed", "datasets", "tokenizers", "huggingface_hub", "peft"),
    *("numpy", "pyarrow", "pandas", "PIL", "tp_plugin", "wandb", "tensorboard", "mlflow"),
}
"""Libraries whose objects are not walked: they have no state of a loss. Modules are walked."""
_DATA: tuple[type, ...] = (torch.utils.data.Dataset, torch.utils.data.DataLoader, torch.utils.data.Sampler)
_STANDARD = sysconfig.get_paths()["stdlib"]
LARGEST = 100_000  # entries of a container, and objects in all; a larger one is data


def replaced(value: Any, by: Mapping[int, Any]) -> Any:
    """Return ``value`` or its replacement; immutable containers are made again."""
    if id(value) in by:
        return by[id(value)]
    if type(value) is tuple and len(value) <= LARGEST:
        made = tuple(replaced(item, by) for item in value)
        return value if all(a is b for a, b in zip(made, value, strict=True)) else made
    if isinstance(value, types.MethodType):
        owner, function = replaced(value.__self__, by), value.__func__
        if owner is value.__self__:
            return value
        # the replacement's method of that name, since its class may differ
        return getattr(owner, function.__name__, types.MethodType(function, owner))
    if type(value) is functools.partial:
        parts = value.func, value.args, tuple(value.keywords.values())
        func, args, values = (replaced(part, by) for part in parts)
        if (func, args, values) == parts and all(a is b for a, b in zip((func, args, values), parts, strict=True)):
            return value
        return functools.partial(func, *args, **dict(zip(value.keywords, values, strict=True)))
    return value


def is_opaque(value: Any) -> bool:
    """Return True for objects of libraries and data, whose attributes are no state of a loss."""
    module = type(value).__module__.split(".")[0]
    if module in OPAQUE or isinstance(value, _DATA) or module in sys.builtin_module_names:
        return True
    return module in sys.stdlib_module_names and not isinstance(value, types.SimpleNamespace)


@functools.cache
def is_users(file: str) -> bool:
    """Return True if a file of code belongs to no installed package."""
    parts = Path(file).parts
    return not ({"site-packages", "dist-packages", "tp_plugin"} & set(parts) or file.startswith((_STANDARD, "<frozen")))


def is_structure(name: str) -> bool:
    """Return True for attributes of a module that are not its own state."""
    return name in ("_parameters", "_buffers", "_modules", "_compiled_call_impl") or "_hooks" in name


def names_of(code: types.CodeType) -> Iterator[str]:
    """Yield global names and attributes that code uses, functions inside of it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_of(constant)


def entries(held: dict[Any, Any]) -> dict[Any, Any]:
    """Copy the entries of a dictionary."""
    return {key: counter(value) for key, value in dict.items(held)}


def same(held: dict[Any, Any], before: dict[Any, Any]) -> bool:
    """Return True if the entries are still the same objects."""
    # not through ZeRO-3's dictionary, which fetches what is read from it
    return list(held) == list(before) and all(dict.__getitem__(held, key) is value for key, value in before.items())


def counter(value: Any) -> Any:
    """Copy an iterator that can be copied; return anything else as it is."""
    return copy.copy(value) if isinstance(value, itertools.count | itertools.cycle) else value


def undo_of(value: Any) -> tuple[bool, Callable[[], object] | None]:
    """Return (True, a function that restores the state) for a random generator or an array of NumPy's.

    (True, None) for other objects of NumPy's, which have no state; (False, None) for all others.
    """
    if isinstance(value, torch.Generator):
        return True, functools.partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return True, functools.partial(value.setstate, value.getstate())
    numpy: Any = sys.modules.get("numpy")
    if numpy is None or not type(value).__module__.startswith("numpy"):
        return False, None
    if isinstance(value, numpy.ndarray) and value.dtype != object and value.flags.writeable:
        return True, functools.partial(numpy.copyto, value, value.copy())
    if isinstance(value, numpy.random.RandomState):
        return True, functools.partial(value.set_state, value.get_state())
    if isinstance(value, numpy.random.Generator):
        bits = value.bit_generator
        return True, functools.partial(setattr, bits, "state", bits.state)
    return True, None
