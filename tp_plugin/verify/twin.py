"""The plain model beside the sharded one: same modules, original classes, weights gathered when they are read.

It shares every tensor with the sharded model and owns none, so it costs no memory until it runs, and then one module's
weights at a time. No layer, hook or loss of ours takes part in it.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tp_plugin.collectives import all_gather
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh
from tp_plugin.sharding.equal import comm_device
from tp_plugin.sharding.original import original_of


def plain_twin(model: nn.Module, mesh: ParallelMesh, dtype: torch.dtype | None = None) -> nn.Module:
    """``model`` as it was before sharding, on the weights it has now; to be run without gradients.

    Reading a sharded parameter of it is a collective over the TP group (and over the data-parallel group where ZeRO-3
    has partitioned it), so all ranks must run the same of it.

    Args:
        dtype: cast floating-point parameters when they are gathered; None leaves them as they are.
    """
    twins: dict[int, nn.Module] = {}
    for module in model.modules():
        kind, attributes = original_of(module)
        twin = kind.__new__(kind)
        twin.__dict__.update(attributes)
        twins[id(module)] = twin
    read = functools.partial(whole, mesh=mesh, dtype=dtype)
    for module in model.modules():
        twin = twins[id(module)]
        twin.__dict__["_compiled_call_impl"] = None
        for name, value in list(vars(twin).items()):
            twin.__dict__[name] = OrderedDict() if "_hooks" in name else _moved(value, twins)
        own = vars(module)["_parameters"]
        # past ZeRO-3's dictionary, which fetches what is read from it
        twin.__dict__["_parameters"] = _Gathered({name: dict.__getitem__(own, name) for name in own}, read)
        twin.__dict__["_modules"] = {
            name: None if child is None else twins[id(child)] for name, child in module._modules.items()
        }
    return twins[id(model)]


@torch.no_grad()
def whole(param: torch.Tensor | None, mesh: ParallelMesh, dtype: torch.dtype | None = None) -> torch.Tensor | None:
    """The full tensor of a sharded, partitioned or plain parameter, on its device; a collective call on every rank."""
    if param is None:
        return None
    layout: ShardLayout | None = getattr(param, "tp_layout", None)
    if hasattr(param, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([param]):
            full = _unsharded(param.detach(), layout, mesh).clone()
    else:
        full = _unsharded(param.detach(), layout, mesh)
    return full.to(dtype) if dtype is not None and full.is_floating_point() else full


def _unsharded(local: torch.Tensor, layout: ShardLayout | None, mesh: ParallelMesh) -> torch.Tensor:
    if layout is None or not layout.is_sharded:
        return local
    sizes = [layout.local_size(rank) for rank in range(layout.ranks)]
    sent = local.to(comm_device(mesh.tp_group))
    parts = all_gather(sent, mesh.tp_group, purpose="guard", sizes=sizes, dim=layout.dim or 0)
    return layout.unshard(parts).to(local.device)


class _Gathered(dict):
    """A module's parameters, made whole one by one when they are read; iterating gives the shards."""

    def __init__(self, params: dict[str, Any], read: Callable[[Any], Any]) -> None:
        super().__init__(params)
        self._read = read

    def __getitem__(self, name: str) -> Any:
        return self._read(super().__getitem__(name))


def _moved(value: Any, twins: dict[int, nn.Module]) -> Any:
    """``value`` with every module of the model replaced by its twin, in the containers modules keep them in."""
    if isinstance(value, nn.Module):
        return twins.get(id(value), value)
    if isinstance(value, types.MethodType) and id(value.__self__) in twins:
        return types.MethodType(value.__func__, twins[id(value.__self__)])
    if type(value) is functools.partial:
        return functools.partial(_moved(value.func, twins), *_moved(value.args, twins), **_moved(value.keywords, twins))
    if type(value) in (list, tuple, set):
        return type(value)(_moved(item, twins) for item in value)
    if type(value) in (dict, OrderedDict):
        return type(value)((name, _moved(item, twins)) for name, item in value.items())
    return value
