"""Every name of ZeRO-3's parameters that this package touches; no other file has one.

ZeRO-3 empties a parameter's data and keeps a flat partition of its tensor-parallel shard on each data-parallel rank.
It notes both as attributes of the parameter. DeepSpeed is imported where it is called: parameters are recognised
without it, so :mod:`tp_plugin.partitioned` asks this module in a process that never registered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tp_plugin.integrations.features import SLOT
from tp_plugin.integrations.upstream import Upstream

SHAPE = "ds_shape"
"""Attribute with the shape of a partitioned parameter, which other libraries read too."""
MODULE_ATTRIBUTES = ("ds_", "applied_pre_backward_ref_cnt", "pre_bwd_fn", "post_bwd_fn", "_external_params")
"""Beginnings of the names of attributes that ZeRO-3 sets on modules; they are no state of a model's own."""
_CHECKPOINT_EVENTS = ("checkpoint_event_prologue", "checkpoint_event_epilogue")
_STAGE3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
_OFFLOAD = "deepspeed.runtime.zero.parameter_offload:DeepSpeedZeRoOffload"
_COORDINATOR = "deepspeed.runtime.zero.partitioned_param_coordinator:PartitionedParameterCoordinator"
_ORDER = "the guard's forwards must not decide what is fetched ahead in training"
upstream = Upstream(SLOT)
for _event in _CHECKPOINT_EVENTS:
    upstream.needs(_STAGE3, _event, [], "prefetched parameters are released by it before an export")
upstream.needs(_OFFLOAD, "get_param_coordinator", [], _ORDER)
upstream.needs(_COORDINATOR, "is_invalid_trace", [], _ORDER)
upstream.needs(_COORDINATOR, "_invalidate_trace", [], _ORDER)


# ---- answers to tp_plugin.partitioned -------------------------------------------------------------------------------


def is_partitioned(tensor: Any) -> bool:
    return hasattr(tensor, "ds_id")


def shard_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(getattr(tensor, SHAPE, tensor.shape))


def own_partition(tensor: torch.Tensor) -> torch.Tensor:
    return partition_data(tensor) if is_partitioned(tensor) else tensor


def gathered(params: Sequence[torch.Tensor]) -> contextlib.AbstractContextManager:
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(params))


@contextlib.contextmanager
def prefetched_released(optimizer: Any) -> Iterator[None]:
    before, after = (getattr(optimizer, name, None) for name in _CHECKPOINT_EVENTS)
    if before is not None:
        before()
    try:
        yield
    finally:
        if after is not None:
            after()


def forget_fetch_order(optimizer: Any) -> None:
    offload = getattr(optimizer, "parameter_offload", None)
    coordinator = None if offload is None else offload.get_param_coordinator()
    if coordinator is not None and not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()


# ---- for the integrations alone -------------------------------------------------------------------------------------


def partition_range(param: Any) -> tuple[int, int]:
    """Elements ``[start, stop)`` of a parameter's flat shard that this rank's partition has, without the padding."""
    size, rank, total = param.ds_tensor.ds_numel, dist.get_rank(param.ds_process_group), param.ds_numel
    return min(rank * size, total), min((rank + 1) * size, total)


def partition_data(param: Any) -> torch.Tensor:
    """The elements of :func:`partition_range` in this rank's memory, 1-D, detached."""
    start, stop = partition_range(param)
    return param.ds_tensor.data.view(-1)[: stop - start]


def release_persistent(optimizer: Any) -> None:
    """Partition the parameters that ZeRO-3 keeps gathered; leaving :func:`prefetched_released` gathers them again."""
    persistent = getattr(optimizer, "persistent_parameters", None)
    if persistent:
        persistent[0].partition(persistent)


@contextlib.contextmanager
def shapes_shown(shapes: Mapping[nn.Parameter, Sequence[int]]) -> Iterator[None]:
    """Give parameters another shape while open, for libraries that prefer :data:`SHAPE` to a parameter's own."""
    for param, shape in shapes.items():
        setattr(param, SHAPE, shape)
    try:
        yield
    finally:
        for param in shapes:
            delattr(param, SHAPE)
