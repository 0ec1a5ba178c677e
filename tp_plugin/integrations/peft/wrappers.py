"""PEFT's wrappers around modules: found, taken out for a while, put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from tp_plugin.sharding.adapters import TrainedCopies

WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def bare_of(model: nn.Module) -> nn.Module | None:
    """Return the model inside a ``PeftModel``, or ``model`` itself with adapters by ``add_adapter``.

    None without an adapter, and for other modules around a ``PeftModel``.
    """
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model if any(isinstance(module, WRAPPERS) for module in model.modules()) else None


def wrappers_of(module: nn.Module, prefix: str = "") -> Iterator[tuple[nn.Module, str, str, Any]]:
    """Yield (parent, name in the parent, full name, wrapper) of the outermost wrappers, once for each name."""
    for leaf, child in module._modules.items():
        name = f"{prefix}{leaf}"
        if isinstance(child, WRAPPERS):
            yield module, leaf, name, child
        elif child is not None:
            yield from wrappers_of(child, f"{name}.")


def wrapped(wrapper: Any) -> nn.Module:
    """Return the module inside ``wrapper``, and inside wrappers in it."""
    if isinstance(wrapper, AuxiliaryTrainingWrapper):
        return wrapper.original_module
    return wrapper.get_base_layer()


def tuners_of(bare: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (full name of the adapted module, layer with adapters); several where they are nested."""
    for _, _, name, wrapper in wrappers_of(bare):
        layer: Any = wrapper
        while isinstance(layer, BaseTunerLayer):
            yield name, layer
            layer = layer._modules.get("base_layer")  # type: ignore[attr-defined]


def copies_of(bare: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (full name, copy) of every module that ``modules_to_save`` trains a copy of."""
    found = [(name, wrapper) for _, _, name, wrapper in wrappers_of(bare) if isinstance(wrapper, ModulesToSaveWrapper)]
    return [(name, copy) for name, wrapper in found for copy in wrapper.modules_to_save.values()]


@contextlib.contextmanager
def taken_out(bare: nn.Module) -> Iterator[TrainedCopies]:
    """While open, the modules are in place of their wrappers."""
    places = list(wrappers_of(bare))
    copies = copies_of(bare)
    for parent, leaf, _, wrapper in places:
        parent._modules[leaf] = wrapped(wrapper)
    try:
        yield copies
    finally:
        for parent, leaf, _, wrapper in places:
            parent._modules[leaf] = wrapper
