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
from tp_plugin.verify.on_use import OnUse
from tp_plugin.weights.stream import full_shape


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
    shown: dict[int, Any] = {}  # a tied parameter is one
    for module in model.modules():
        twin = twins[id(module)]
        twin.__dict__["_compiled_call_impl"] = None
        for name, value in list(vars(twin).items()):
            twin.__dict__[name] = OrderedDict() if "_hooks" in name else _moved(value, twins)
        own = vars(module)["_parameters"]
        # past ZeRO-3's dictionary, which fetches what is read from it
        gathered = _Gathered({name: dict.__getitem__(own, name) for name in own}, read, dtype, shown)
        twin.__dict__["_parameters"] = gathered
        if own:
            twin.register_forward_pre_hook(gathered.fill)
            twin.register_forward_hook(gathered.empty, always_call=True)
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


_DEPTH = 4  # of functions that wrap functions


class _Gathered(dict):
    """A module's parameters, made whole when they are read; iterating gives such as are read when used.

    During the module's forward all of them are, once: how often a forward reads one may depend on its data (an expert
    that got tokens), and every reading is a collective.
    """

    def __init__(
        self, params: dict[str, Any], read: Callable[[Any], Any], dtype: torch.dtype | None, shown: dict[int, Any]
    ) -> None:
        super().__init__(params)
        self._read = read
        self._whole: dict[str, Any] = {}
        for name, param in params.items():
            if id(param) not in shown:
                shown[id(param)] = _shown(param, functools.partial(self.__getitem__, name), dtype)
        self._shown = {name: shown[id(param)] for name, param in params.items()}

    def items(self) -> Any:
        return self._shown.items()

    def values(self) -> Any:
        return self._shown.values()

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default

    def __getitem__(self, name: str) -> Any:
        return self._whole[name] if name in self._whole else self._read(super().__getitem__(name))

    def fill(self, *_: object) -> None:
        self._whole = {name: self._read(param) for name, param in dict.items(self)}

    def empty(self, *_: object) -> None:
        self._whole = {}


def _shown(param: Any, read: Callable[[], Any], dtype: torch.dtype | None) -> Any:
    """``param`` where that is whole already, else something of its full shape that is read when used.

    Models ask their first parameter for the dtype and the device to work in, which must be no collective.
    """
    if param is None:
        return None
    wanted = dtype if dtype is not None and param.is_floating_point() else param.dtype
    if full_shape(param) == tuple(param.shape) and wanted == param.dtype:
        return param
    return OnUse(param, read, full_shape(param), wanted)


def _moved(value: Any, twins: dict[int, nn.Module], depth: int = 0) -> Any:
    """``value`` with every module of the model replaced by its twin, in the containers modules keep them in."""
    if isinstance(value, nn.Module):
        return twins.get(id(value), value)
    if isinstance(value, types.MethodType):
        function, owner = _moved(value.__func__, twins, depth), _moved(value.__self__, twins, depth)
        return value if function is value.__func__ and owner is value.__self__ else types.MethodType(function, owner)
    if isinstance(value, types.FunctionType):
        return _with_cells_moved(value, twins, depth)
    if type(value) is functools.partial:
        function, args, keywords = (_moved(part, twins, depth) for part in (value.func, value.args, value.keywords))
        return functools.partial(function, *args, **keywords)
    if type(value) in (list, tuple, set):
        return type(value)(_moved(item, twins, depth) for item in value)
    if type(value) in (dict, OrderedDict):
        return type(value)((name, _moved(item, twins, depth)) for name, item in value.items())
    return value


def _with_cells_moved(function: types.FunctionType, twins: dict[int, nn.Module], depth: int) -> types.FunctionType:
    """A function that closes over modules or their methods (a wrapped ``forward``), closing over the twins' instead."""
    if depth >= _DEPTH or not function.__closure__:
        return function
    cells, changed = [], False
    for cell in function.__closure__:
        try:
            content = cell.cell_contents
        except ValueError:  # not filled yet
            cells.append(cell)
            continue
        moved = _moved(content, twins, depth + 1)
        changed |= moved is not content
        cells.append(cell if moved is content else types.CellType(moved))
    if not changed:
        return function
    made = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(function.__dict__)
    return made
