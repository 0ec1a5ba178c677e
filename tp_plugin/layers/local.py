"""What a forward reads of its module and its arguments, made this rank's: head counts, widths, ALiBi."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tp_plugin.errors import TensorParallelError


class LocalConfig:
    """A view of a model's config in which some attributes are this rank's; everything else is the config's own."""

    def __init__(self, config: Any, **local: Any) -> None:
        self.__dict__.update(tp_config=config, **local)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "tp_config":  # asked of a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self.tp_config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.tp_config, name, value)


def set_local(module: nn.Module, attribute: str, value: int) -> None:
    """Set ``module.attribute``, or ``x`` of its config where the attribute is ``config.x``."""
    owner, _, name = attribute.rpartition(".")
    if not owner:
        setattr(module, name, value)
        return
    config: Any = getattr(module, owner)
    if isinstance(config, LocalConfig):
        config.__dict__[name] = value
    else:
        setattr(module, owner, LocalConfig(config, **{name: value}))


def slice_heads(module: nn.Module, argument: str, heads: int, held: Sequence[int]) -> None:
    """Give ``module`` only its own heads of an argument: ``[batch, heads, ...]`` or ``[batch * heads, ...]``.

    A tensor of four dimensions with one entry for all heads is left as it is.
    """
    names = list(inspect.signature(module.forward).parameters)
    place = names.index(argument) if argument in names else len(names)

    def before(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if argument in kwargs:
            return args, kwargs | {argument: _own(kwargs[argument], heads, held)}
        if place < len(args):
            return (*args[:place], _own(args[place], heads, held), *args[place + 1 :]), kwargs
        raise TensorParallelError(
            f"{type(module).__name__} is no longer called with {argument!r}, whose heads tp-plugin has to slice: the "
            "installed transformers is not the one its rules were written for, use the version in constraints.txt."
        )

    module.register_forward_pre_hook(before, with_kwargs=True)


def _own(tensor: torch.Tensor | None, heads: int, held: Sequence[int]) -> torch.Tensor | None:
    if tensor is None or (tensor.dim() == 4 and tensor.shape[1] == 1):
        return tensor
    dim = 1 if tensor.dim() == 4 else 0
    start, count = held[0], len(held)
    if list(held) != list(range(start, start + count)) or tensor.shape[dim] % heads:
        raise TensorParallelError(f"an argument of shape {list(tensor.shape)} has no entry for each of {heads} heads.")
    if dim == 1:
        return tensor.narrow(1, start, count)
    return tensor.unflatten(0, (-1, heads)).narrow(1, start, count).flatten(0, 1)
