"""What PEFT puts around modules: found, taken out for a while, put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from tp_plugin.sharding.adapters import Twins

WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def bare_of(model: nn.Module) -> nn.Module | None:
    """The transformers model inside a ``PeftModel``, or ``model`` itself with adapters of ``add_adapter`` in it.

    None where there is no adapter, and for other modules around a ``PeftModel``.
    """
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model if any(isinstance(module, WRAPPERS) for module in model.modules()) else None


def wrappers_of(module: nn.Module, prefix: str = "") -> Iterator[tuple[nn.Module, str, str, Any]]:
    """(parent, name in the parent, full name, wrapper) of the outermost wrappers, under every name they have."""
    for leaf, child in module._modules.items():
        name = f"{prefix}{leaf}"
        if isinstance(child, WRAPPERS):
            yield module, leaf, name, child
        elif child is not None:
            yield from wrappers_of(child, f"{name}.")


def wrapped(wrapper: Any) -> nn.Module:
    """The module that ``wrapper``, or wrappers in it, stand before."""
    if isinstance(wrapper, AuxiliaryTrainingWrapper):
        return wrapper.original_module
    return wrapper.get_base_layer()


def tuners_of(bare: nn.Module) -> Iterator[tuple[str, Any]]:
    """(full name of the module it adapts, layer with adapters); several where they are nested."""
    for _, _, name, wrapper in wrappers_of(bare):
        layer: Any = wrapper
        while isinstance(layer, BaseTunerLayer):
            yield name, layer
            layer = layer._modules.get("base_layer")  # type: ignore[attr-defined]


def twins_of(bare: nn.Module) -> list[tuple[str, nn.Module]]:
    """(full name, copy) of every module that ``modules_to_save`` trains a copy of."""
    found = [(name, wrapper) for _, _, name, wrapper in wrappers_of(bare) if isinstance(wrapper, ModulesToSaveWrapper)]
    return [(name, twin) for name, wrapper in found for twin in wrapper.modules_to_save.values()]


@contextlib.contextmanager
def taken_out(bare: nn.Module) -> Iterator[Twins]:
    """While open, the modules stand where their wrappers stood."""
    places = list(wrappers_of(bare))
    twins = twins_of(bare)
    for parent, leaf, _, wrapper in places:
        parent._modules[leaf] = wrapped(wrapper)
    try:
        yield twins
    finally:
        for parent, leaf, _, wrapper in places:
            parent._modules[leaf] = wrapper
