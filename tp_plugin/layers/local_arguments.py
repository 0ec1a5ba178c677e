"""Attributes and arguments of a forward as this rank's: head counts and numbers, widths, ALiBi."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from tp_plugin.errors import TensorParallelError
from tp_plugin.layers.linear import ColumnParallel, RowParallel


class LocalConfig:
    """A view of a model's config with this rank's values of some attributes."""

    def __init__(self, config: Any, **local: Any) -> None:
        self.__dict__.update(tp_config=config, **local)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "tp_config":  # a copy asks before its attributes are set
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
    """Slice this rank's heads out of an argument of ``module``: ``[batch, heads, ...]`` or ``[batch * heads, ...]``.

    A 4-dim tensor with one entry for all heads is left as it is.
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


class Heads(NamedTuple):
    """Query heads of one attention.

    Attributes:
        numbers: this rank's heads, by their numbers in the full model, in the order of the query's heads.
        total: heads of the full model.
    """

    numbers: tuple[int, ...]
    total: int


def attention_heads(module: nn.Module, count: int) -> Heads:
    """Number the query heads that an attention function is called with as the full model does.

    A registered attention function of a sharded model gets a rank's heads. A function with a slope or a bias for each
    head picks those of ``numbers``::

        heads = tp_plugin.attention_heads(module, query.shape[1])
        slopes = slopes_of(heads.total)[list(heads.numbers)]

    Args:
        module: the attention, as transformers gives it to an attention function.
        count: query heads of the call, ``query.shape[1]``.

    Raises:
        TensorParallelError: ``count`` is not the number of this rank's query heads.
    """
    # the input of a row-parallel layer is as wide as the query heads' values
    parts: list[RowParallel | ColumnParallel] = [p for p in module.modules() if isinstance(p, RowParallel)]
    parts += [p for p in module.modules() if isinstance(p, ColumnParallel) and not p.tp_gather]
    if not parts or getattr(parts[0], "tp_split", False):
        return Heads(tuple(range(count)), count)
    mesh, layout = parts[0].tp_mesh, parts[0].tp_layout
    held, size = layout.local_size(mesh.tp_rank), layout.shape[layout.dim or 0]
    if count < 1 or held % count or size % (held // count):
        raise TensorParallelError(
            f"attention_heads was given {count} query heads, which do not divide this rank's {held} of {size} columns "
            f"of {type(module).__name__}; give it query.shape[1]."
        )
    width = held // count
    numbers = [place // width for start, stop in layout.parts[mesh.tp_rank] for place in range(start, stop, width)]
    return Heads(tuple(numbers), size // width)
