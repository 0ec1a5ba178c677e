"""The unsharded view of a sharded model: same modules, original classes, weights gathered when they are read.

It shares every tensor with the sharded model and owns none, so it costs no memory until it runs. A run holds one
module's weights at a time. No layer, hook or loss of this package takes part in it.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from tp_plugin import partitioned
from tp_plugin.collectives import all_gather
from tp_plugin.layers.instance_forwards import moved
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh, comm_device
from tp_plugin.param_info import full_shape, layout_of, sharded_layout
from tp_plugin.sharding.pre_shard_state import original_of
from tp_plugin.step_guard.param_view import CollectiveReads, DeferredParam, ParamView

STANDS_FOR = "tp_stands_for"
"""On a view: id of a module or parameter of the sharded model -> its counterpart in the view."""


def unsharded_view(
    model: nn.Module, mesh: ParallelMesh, dtype: torch.dtype | None = None, reads: CollectiveReads | None = None
) -> nn.Module:
    """``model`` as it was before sharding, on its present weights; to be run without gradients.

    Reading a sharded parameter is a collective over the TP group, and over the data-parallel group where ZeRO-3 has
    partitioned it. So all ranks must run the same parts of it.

    Args:
        dtype: cast floating-point parameters when they are gathered; None leaves them as they are.
        reads: the run it takes part in, whose ranks agree before each exchange; None lets them exchange at once.
    """
    views: dict[int, nn.Module] = {}
    for module in model.modules():
        kind, attributes = original_of(module)
        view = kind.__new__(kind)
        view.__dict__.update(attributes)
        views[id(module)] = view
    read = functools.partial(gathered, mesh=mesh, dtype=dtype, reads=reads)
    placeholders: dict[int, Any] = {}  # a tied parameter is one

    def counterpart(value: Any) -> Any:
        return views.get(id(value), value) if isinstance(value, nn.Module) else value

    for module in model.modules():
        view = views[id(module)]
        view.__dict__["_compiled_call_impl"] = None
        for name, value in list(vars(view).items()):
            view.__dict__[name] = OrderedDict() if "_hooks" in name else moved(value, counterpart)
        own = vars(module)["_parameters"]
        # not through ZeRO-3's dictionary, which fetches what is read from it
        copied = {name: dict.__getitem__(own, name) for name in own}
        params = ParamView(copied, read, functools.partial(_placeholder, dtype=dtype), placeholders, ahead=True)
        params.values()  # fills placeholders
        view.__dict__["_parameters"] = params
        if own:
            view.register_forward_pre_hook(params.enter_forward)
            view.register_forward_hook(params.leave_forward, always_call=True)
        view.__dict__["_modules"] = {
            name: None if child is None else views[id(child)] for name, child in module._modules.items()
        }
    views[id(model)].__dict__[STANDS_FOR] = placeholders | views
    return views[id(model)]


def _placeholder(param: torch.Tensor, read: Callable[[], Any], dtype: torch.dtype | None) -> torch.Tensor:
    """``param`` itself where that is full already.

    Models ask their first parameter for the dtype and the device to work in, which must be no collective.
    """
    wanted = dtype if dtype is not None and param.is_floating_point() else param.dtype
    if full_shape(param) == tuple(param.shape) and wanted == param.dtype:
        return param
    return DeferredParam(param, read, full_shape(param), wanted)


@torch.no_grad()
def gathered(
    param: torch.Tensor | None,
    mesh: ParallelMesh,
    dtype: torch.dtype | None = None,
    reads: CollectiveReads | None = None,
) -> torch.Tensor | None:
    """The full tensor of a sharded, partitioned or plain parameter, on its device; a collective call on every rank."""
    if param is None:
        return None
    layout = layout_of(param)
    if reads is not None and (partitioned.is_partitioned(param) or sharded_layout(param) is not None):
        numel = math.prod(full_shape(param))
        # the ranks' shards and the full tensor, or that and its cast
        second = param.dtype if dtype is None or not param.is_floating_point() else dtype
        reads.ready(numel * (param.dtype.itemsize + max(param.dtype.itemsize, second.itemsize)))
    if partitioned.is_partitioned(param):
        with partitioned.gathered([param]):
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


def stand_in(wrapper: nn.Module, inner: nn.Module) -> nn.Module:
    """An object like ``wrapper`` (an engine with its model as ``module``) that runs ``inner``, for losses that get one.

    Code that unwraps it by ``module``, or by its class, finds ``inner``. Every other attribute is the wrapper's.
    """
    kind = _kind_of(type(wrapper))
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    made.__dict__["tp_wrapper"] = wrapper
    made.module = inner
    made.training = inner.training
    return made


def _kind_of(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __getattr__(self: Any, name: str) -> Any:
        for part in ("_parameters", "_buffers", "_modules"):
            if name in self.__dict__.get(part, ()):
                return self.__dict__[part][name]
        if name in vars(self.tp_wrapper):
            return vars(self.tp_wrapper)[name]
        return getattr(self.__dict__["_modules"]["module"], name)

    body = {"forward": forward, "__getattr__": __getattr__, "__del__": lambda _: None}
    return type(f"{kind.__name__}StandIn", (kind,), body)


class RunsShardedError(RuntimeError):
    """A loss, given the unsharded view, ran the sharded model."""


@contextlib.contextmanager
def sharded_runs_refused(models: Iterable[nn.Module]) -> Iterator[None]:
    """Raise RunsShardedError from forwards of sharded ``models`` while open."""

    def refuse(_module: nn.Module, _args: Any) -> None:
        raise RunsShardedError(
            "the loss runs the sharded model, which it holds where no other model can be put in its place"
        )

    with contextlib.ExitStack() as stack:
        for module in {part: None for model in models for part in (model, backbone_of(model))}:
            stack.callback(module.register_forward_pre_hook(refuse, prepend=True).remove)
        yield


def backbone_of(model: nn.Module) -> nn.Module:
    """Find the model without its head and without wrappers, which every forward passes.

    That is the innermost module around all layers with more than half of its parent's parameters, the same on every
    rank. It is ``model`` itself where no child has so many.
    """
    while True:
        sizes = {child: sum(math.prod(full_shape(param)) for param in child.parameters()) for child in model.children()}
        largest = max(sizes, key=sizes.__getitem__, default=model)
        contains_layers = not isinstance(largest, nn.ModuleList | nn.ModuleDict | nn.Sequential) and any(
            largest.children()
        )
        if not contains_layers or sizes.get(largest, 0) * 2 <= sum(sizes.values()):
            return model
        model = largest
