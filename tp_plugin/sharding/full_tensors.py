"""Full tensors given to a sharded model, and shards given where full tensors are expected."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from tp_plugin.errors import TensorParallelError
from tp_plugin.mesh import ParallelMesh
from tp_plugin.param_info import full_shape, layout_of
from tp_plugin.partitioned import shard_shape
from tp_plugin.sharding.state import PART

NO_ASSIGN = (
    "low_cpu_mem_usage=True (or assign=True) replaces the parameters of a sharded model, which carry its layouts; "
    "leave it off."
)
_SHARDED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""The sharded models of this process."""


def take_full_tensors(model: nn.Module, mesh: ParallelMesh) -> None:
    """Let ``load_state_dict`` of every module in ``model`` accept full tensors, and shards as before.

    Call it again after :func:`tp_plugin.sharding.state.mark_parts` has marked more modules.
    """
    _SHARDED.add(model)

    def shard(module: nn.Module, state: dict, prefix: str, metadata: dict, *_: object) -> None:
        if metadata.get("assign_to_params_buffers"):  # the model itself comes first, and nothing is assigned yet
            raise TensorParallelError(NO_ASSIGN)
        for name, param in module.named_parameters(recurse=False):
            layout = layout_of(param)
            given = state.get(f"{prefix}{name}")
            if layout is not None and given is not None and tuple(given.shape) == layout.shape:
                state[f"{prefix}{name}"] = layout.shard(given, mesh.tp_rank)

    for module in model.modules():
        if PART in module.__dict__ and "tp_takes_full" not in module.__dict__:
            module.__dict__["tp_takes_full"] = True
            module.register_load_state_dict_pre_hook(shard)


def shard_in(state: Mapping[Any, Any], model: nn.Module, wrappers: Collection[str] = ()) -> Found | None:
    """Find the first tensor of ``state`` that is this rank's shard of a parameter of ``model``.

    Args:
        state: tensors under names of the model, or under those with names of wrappers and adapters in them.
        model: a sharded model, or what wraps one.
        wrappers: such parts of names, besides :data:`WRAPPERS`.

    Returns:
        the name, the shard's shape and the full parameter's.
    """
    params: dict[str, list[nn.Parameter]] = {}
    for name, param in _sharded(model):
        params.setdefault(_plain(name, wrappers), []).append(param)
    for name, tensor in _tensors(state):
        shape, known = tuple(tensor.shape), params.get(_plain(name, wrappers), [])
        if any(shape in _held(one) for one in known) and all(shape != full_shape(one) for one in known):
            return (name, shape, full_shape(known[0]))
    return None


def shard_of_any(state: Mapping[Any, Any]) -> Found | None:
    """:func:`shard_in` for any sharded model of this process; ``state`` may be that of a part of one.

    Tensors that share a parameter's memory are recognised by it. Copies are recognised by names and shapes, if every
    tensor of ``state`` has those of one model: a model of other sizes is no shard. Names of a part are matched by their
    ends if they have at least three components: shorter ones occur in many modules.
    """
    most: list[Found] = []
    for model in list(_SHARDED):
        found = _shards_of(model, state)
        most = found if len(found) > len(most) else most
    return most[0] if most else None


def _shards_of(model: nn.Module, state: Mapping[Any, Any]) -> list[Found]:
    places = {param.data_ptr(): param for _, param in _sharded(model)}
    ends: dict[str, list[Any]] = {}
    for name, kept in model.state_dict(keep_vars=True).items():
        parts = _plain(name).split(".")
        for start in range(max(1, len(parts) - 2)):
            ends.setdefault(".".join(parts[start:]), []).append(kept)
    by_memory: list[Found] = []
    by_name: list[Found] = []
    alike = True
    for name, tensor in _tensors(state):
        shape: tuple[int, ...] = tuple(tensor.shape)
        place = places.get(tensor.data_ptr()) if tensor.numel() else None
        if place is not None and shape in _held(place):
            by_memory.append((name, shape, full_shape(place)))
            continue
        known = [one for one in ends.get(_plain(name), ()) if shape in _held(one)]
        alike &= bool(known)
        if known and all(shape != full_shape(one) for one in known):
            by_name.append((name, shape, full_shape(known[0])))
    return by_memory + by_name if alike else by_memory


def _sharded(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of which this rank has less than the full tensor, by every name."""
    for name, param in model.named_parameters(remove_duplicate=False):
        if any(shape != full_shape(param) for shape in _held(param)):
            yield name, param


def _tensors(state: Mapping[Any, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in state.items():
        if isinstance(name, str) and isinstance(tensor, torch.Tensor):
            yield name, tensor


def _plain(name: str, wrappers: Collection[str] = ()) -> str:
    bare = ".".join(part for part in name.split(".") if part not in WRAPPERS and part not in wrappers)
    return bare.removeprefix("base_model.model.")


def _held(param: Any) -> set[tuple[int, ...]]:
    """Shapes of this rank's shard, and of the tensor that ZeRO-3 leaves in its place."""
    return {tuple(param.shape), shard_shape(param)}


Found = tuple[str, tuple[int, ...], tuple[int, ...]]
WRAPPERS = frozenset({"module", "_orig_mod", "base_layer", "original_module", "modules_to_save"})
"""Parts of names that wrappers add."""
