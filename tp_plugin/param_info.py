"""ParamInfo: the record that a parameter of a sharded model carries, and the only way to read or change it.

Like Megatron-LM's table of parameter attributes (core/tensor_parallel/layers.py), but typed. DeepSpeed's own flag,
``tensor_model_parallel``, stays an attribute of the parameter: DeepSpeed reads it there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from tp_plugin.layout import ShardLayout
from tp_plugin.loss import VocabShard
from tp_plugin.mesh import ParallelMesh
from tp_plugin.partitioned import shard_shape

_ATTRIBUTE = "tp_info"


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """The sharding of one parameter.

    Attributes:
        layout: index intervals that each rank of the TP group has of it; None where every rank has the full tensor.
        vocab: this rank's part of the vocabulary, on the weight of a vocabulary-parallel head.
        gradient_summed: a hook sums its gradient, or a part of it, over the TP group.
        partial_over: mesh over whose TP group the gradient of a replicated parameter is summed.
        adapter_sharded: it is the first parameter of an adapter that has been sharded.
    """

    layout: ShardLayout | None = None
    vocab: VocabShard | None = None
    gradient_summed: bool = False
    partial_over: ParallelMesh | None = None
    adapter_sharded: bool = False


_EMPTY = ParamInfo()


def info_of(param: torch.Tensor | Any) -> ParamInfo:
    """The record of ``param``; an empty one where it carries none."""
    found: ParamInfo = getattr(param, _ATTRIBUTE, _EMPTY)
    return found


def layout_of(param: torch.Tensor | Any) -> ShardLayout | None:
    """Layout of ``param``; None for a tensor without one, which is replicated."""
    return info_of(param).layout


def sharded_layout(param: torch.Tensor | Any) -> ShardLayout | None:
    """Layout of ``param`` if this rank may have only a shard of it, else None."""
    layout = layout_of(param)
    return layout if layout is not None and layout.is_sharded else None


def update_info(param: torch.Tensor, **changes: Any) -> None:
    """Change fields of the record of ``param``."""
    setattr(param, _ATTRIBUTE, dataclasses.replace(info_of(param), **changes))


def copy_info(source: torch.Tensor, target: torch.Tensor) -> None:
    """Give ``target``, a copy of ``source``, its record; not its hooks, which copying drops."""
    update_info(target, **vars(info_of(source)) | {"gradient_summed": False})


def full_shape(param: torch.Tensor | Any) -> tuple[int, ...]:
    """Shape of the unsharded tensor, whatever TP and ZeRO-3 have done to this one."""
    layout = layout_of(param)
    return layout.shape if layout is not None else shard_shape(param)
