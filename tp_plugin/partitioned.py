"""Parameters that are partitioned over data-parallel ranks, beside their tensor-parallel sharding (ZeRO-3).

Rooms below ``integrations`` ask here. :mod:`tp_plugin.integrations.zero3`, the only file that knows DeepSpeed's names
for such parameters, answers.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import torch
from torch import nn


class Partitioning(Protocol):
    """An engine's answers to the functions of this module, which say what each does."""

    def is_partitioned(self, tensor: Any) -> bool: ...
    def shard_shape(self, tensor: torch.Tensor) -> tuple[int, ...]: ...
    def own_partition(self, tensor: torch.Tensor) -> torch.Tensor: ...
    def gathered(self, params: Sequence[torch.Tensor]) -> AbstractContextManager: ...
    def prefetched_released(self, optimizer: Any) -> AbstractContextManager: ...
    def forget_fetch_order(self, optimizer: Any) -> None: ...


@functools.cache
def _answers() -> Partitioning:
    """The module that answers, imported by its name when it is first asked: it is above this floor."""
    return cast(Partitioning, importlib.import_module("tp_plugin.integrations.zero3"))


def is_partitioned(tensor: Any) -> bool:
    """Return True for a parameter of which this rank keeps a partition."""
    return _answers().is_partitioned(tensor)


def has_partitioned(model: nn.Module) -> bool:
    """Return True if any parameter of ``model`` is partitioned."""
    return any(is_partitioned(param) for param in model.parameters())


def shard_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Shape of the tensor-parallel shard, whether it is partitioned or not."""
    return _answers().shard_shape(tensor)


def own_partition(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's partition, 1-D and perhaps empty; ``tensor`` itself if it is not partitioned.

    Padding is left out: it is memory that DeepSpeed does not set, so it differs between replicas.
    """
    return _answers().own_partition(tensor)


def gathered(params: Sequence[torch.Tensor]) -> AbstractContextManager:
    """Gather partitioned ``params`` while open. A collective call over their data-parallel group."""
    return _answers().gathered(params)


def prefetched_released(optimizer: Any) -> AbstractContextManager:
    """Release the parameters that the engine of ``optimizer`` has prefetched; on leaving, it gathers them again."""
    return _answers().prefetched_released(optimizer)


def forget_fetch_order(optimizer: Any) -> None:
    """Make the engine of ``optimizer`` record again in which order a forward reads parameters, to fetch them ahead.

    A model in evaluation mode may read a weight elsewhere than in training. Training may read it outside of its own
    module. DeepSpeed does not note that where the weight was fetched ahead, and the weight is missing in the backward.
    """
    _answers().forget_fetch_order(optimizer)
