"""State dicts of a sharded model: refused where its shards would pass for full tensors.

``torch.save`` and safetensors would write a file that looks like a model's until it is loaded elsewhere. A copy of the
unsharded model (a moving average, a snapshot) has other shapes. Names and shapes are compared with the sharded models
of this process; without one nothing is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.features import WEIGHTS
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.partitioned import has_partitioned
from tp_plugin.sharding import state_of
from tp_plugin.sharding.full_tensors import shard_of_any
from tp_plugin.sharding.state import NO_PICKLE

upstream = Upstream(WEIGHTS)
_DEPTH = 4
"""Levels of containers that are searched: ``{"epoch": ..., "model": {"state": {name: tensor}}}``."""


@upstream.patch(torch, "save", ["obj", "f"], "it would write this rank's shards as a model")
def _save(original: Callable[..., None], obj: Any, *args: Any, **options: Any) -> None:
    for state in _states_in(obj):
        _refuse("torch.save", state)
    original(obj, *args, **options)


@upstream.patch(safetensors.torch, "_find_shared_tensors", ["state_dict"], "every function that writes calls it")
def _find_shared_tensors(original: Callable[..., Any], state_dict: Mapping[str, torch.Tensor]) -> Any:
    _refuse("safetensors", state_dict)
    return original(state_dict)


def _states_in(obj: Any, depth: int = _DEPTH) -> Iterator[Mapping[Any, Any]]:
    if isinstance(obj, nn.Module) and state_of(obj) is not None:
        raise TensorParallelError(NO_PICKLE)
    if isinstance(obj, Mapping):
        yield obj
    if isinstance(obj, Mapping | list | tuple) and depth:
        for value in obj.values() if isinstance(obj, Mapping) else obj:
            yield from _states_in(value, depth - 1)


def _refuse(writer: str, state: Mapping[Any, Any]) -> None:
    found = shard_of_any(state)
    if found is not None:
        name, _, full = found
        raise TensorParallelError(
            f"{writer} was to write this rank's shard of {name!r}, which is {list(full)} in the model: call "
            "tp_plugin.full_state_dict(model) on every rank and write its result on rank 0, or call "
            "tp_plugin.save_pretrained(model, directory) on every rank."
        )


@upstream.patch(nn.Module, "load_state_dict", ["state_dict", "strict", "assign"], "it would list sizes of shards")
def _load_state_dict(
    original: Callable[..., Any], self: nn.Module, state_dict: Mapping[str, Any], *args: Any, **options: Any
) -> Any:
    try:
        return original(self, state_dict, *args, **options)
    except RuntimeError as failure:
        if state_of(self) is not None and has_partitioned(self):
            raise TensorParallelError(
                f"load_state_dict of a {type(self).__name__} whose parameters ZeRO-3 has partitioned; load before "
                "deepspeed.initialize, or engine.load_checkpoint after it."
            ) from failure
        found = shard_of_any(state_dict) if isinstance(state_dict, Mapping) and state_of(self) is None else None
        if found is None:
            raise
        name, _, full = found
        raise TensorParallelError(
            f"load_state_dict was given this rank's shard of {name!r} for an unsharded {type(self).__name__}, where it "
            f"is {list(full)}: give it what tp_plugin.full_state_dict(model) returns on rank 0, or keep clones of the "
            "sharded model's parameters."
        ) from failure


@upstream.patch(AveragedModel, "update_parameters", ["model"], "it would average shards into an unsharded model")
def _update_parameters(original: Callable[..., None], self: AveragedModel, model: nn.Module) -> None:
    if state_of(model) is not None:
        pairs = zip(model.named_parameters(), self.module.parameters(), strict=False)
        for (name, param), average in pairs:
            if param.shape != average.shape:
                raise TensorParallelError(
                    f"AveragedModel is an unsharded model and cannot average {name!r}, a shard of "
                    f"{list(average.shape)}: average clones of the sharded model's parameters instead, and copy the "
                    "average into the model to save or evaluate it."
                )
    original(self, model)
