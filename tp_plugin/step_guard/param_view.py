"""Parameters that are computed when they are read: gathered over ranks, or cast to single precision.

Reading a gathered one is a collective. A rank that runs out of memory alone would leave the other ranks waiting until
the process group's timeout: other processes share its GPU, its shard is larger, its memory is fragmented. So the ranks
agree before each exchange (:class:`CollectiveReads`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map_only

from tp_plugin.collectives import all_reduce_
from tp_plugin.mesh import ParallelMesh, comm_device
from tp_plugin.partitioned import has_partitioned

_PASSED_ON = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
_DELETED = object()
Read = Callable[[Any], Any]
"""Computes the value of a parameter or None, such as its full tensor."""


class ParamView(MutableMapping[str, Any]):
    """Takes the place of a module's ``_parameters``: each is computed when it is read.

    During the module's forward each is computed once. Iterating gives placeholders that compute their value when they
    are used. Entries can be set and deleted for this run, as parametrizations do; the module keeps its own.

    It is no ``dict``, which ZeRO-3's hooks would replace; their attributes on it reach the original.

    Args:
        own: the module's parameters.
        read: computes the value of one.
        placeholder: makes the placeholder of (a parameter, its reader); the parameter itself where none is needed.
        shared: placeholders by the id of their parameter, so that a tied parameter has one.
        ahead: compute all of them when a forward begins. How often a forward reads one may depend on this rank's data
            (an expert that got tokens), which a collective must not.
    """

    def __init__(
        self,
        own: dict[str, Any],
        read: Read,
        placeholder: Callable[[Any, Callable[[], Any]], Any],
        shared: dict[int, Any],
        *,
        ahead: bool,
    ) -> None:
        self._own, self._read, self._ahead = own, read, ahead
        self._placeholder, self._shared = placeholder, shared
        self._given: dict[str, Any] = {}
        self._kept: dict[str, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        if "_own" not in vars(self):
            raise AttributeError(name)
        return getattr(self._own, name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in dict.fromkeys((*self._own, *self._given)) if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return self._given[name] is not _DELETED if name in self._given else name in self._own

    def __getitem__(self, name: str) -> Any:
        if name in self._given:
            if self._given[name] is _DELETED:
                raise KeyError(name)
            return self._given[name]
        if self._kept is not None and name in self._kept:
            return self._kept[name]
        value = self._read(self._own[name])  # ZeRO-3 may have to fetch it
        if self._kept is not None:
            self._kept[name] = value
        return value

    def __setitem__(self, name: str, value: Any) -> None:
        self._given[name] = value  # for this run; the model keeps its own

    def __delitem__(self, name: str) -> None:
        self[name]  # raises KeyError
        self._given[name] = _DELETED

    def items(self) -> Any:
        return [(name, self._shown(name)) for name in self]

    def values(self) -> Any:
        return [self._shown(name) for name in self]

    def _shown(self, name: str) -> Any:
        if name in self._given:
            return self._given[name]
        param = dict.__getitem__(self._own, name)  # not through ZeRO-3's dictionary, which fetches
        if id(param) not in self._shared:
            self._shared[id(param)] = None if param is None else self._placeholder(param, lambda: self[name])
        return self._shared[id(param)]

    def enter_forward(self, *_: object) -> None:
        """A forward pre-hook of the module."""
        self._kept = {}
        for name in self if self._ahead else ():
            self[name]

    def leave_forward(self, *_: object) -> None:
        """A forward hook of the module."""
        self._kept = None


class DeferredParam(torch.Tensor):
    """Placeholder of a parameter whose value is expensive: it has shape, dtype and device, and reads at each operation.

    A loss over all parameters then holds one value at a time, though ``named_parameters`` keeps what it has given.

    Args:
        param: the parameter it stands for.
        read: returns its value, of ``shape`` and ``dtype``.
    """

    _read: Callable[[], torch.Tensor]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, param: torch.Tensor, read: Callable[[], torch.Tensor], shape: Sequence[int], dtype: torch.dtype
    ) -> DeferredParam:
        made = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=param.device, requires_grad=param.requires_grad
        )
        made._read = read
        made._is_param = isinstance(param, torch.nn.Parameter)  # isinstance(made, nn.Parameter) asks for it
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in _PASSED_ON:
            (param,) = args
            return DeferredParam(torch.empty(0, device=param.device), param._read, param.shape, param.dtype)
        args, kwargs = tree_map_only(DeferredParam, lambda param: param._read(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DeferredParam(shape={list(self.shape)}, dtype={self.dtype})"


class PeerFailedError(RuntimeError):
    """Another rank failed in a run that this rank takes part in; that rank knows why."""


class CollectiveReads:
    """One run that reads gathered parameters; a context manager around it.

    Before each exchange, and at the end, the ranks tell each other in one all-reduce if any has failed. They are those
    of the TP group, or of the world where ZeRO-3 has partitioned parameters.

    Raises:
        PeerFailedError: on leaving, and from :meth:`ready`, on every rank but those that failed themselves.
    """

    def __init__(self, models: Iterable[nn.Module], mesh: ParallelMesh) -> None:
        self.group = dist.group.WORLD if any(map(has_partitioned, models)) else mesh.tp_group
        self.over = False  # every rank knows that one failed

    def ready(self, nbytes: int) -> None:
        """Reserve ``nbytes`` for an exchange, and wait until every rank has reserved its own."""
        failure: Exception | None = None
        try:
            torch.empty(nbytes, dtype=torch.uint8, device=comm_device(self.group))  # the allocator keeps it at hand
        except Exception as failed:
            failure = failed
        self._agree(failure, done=False)

    def _agree(self, failure: Exception | None, *, done: bool) -> None:
        mine = [failure is not None, done, not done]
        flags = torch.tensor(mine, dtype=torch.int32, device=comm_device(self.group))
        all_reduce_(flags, self.group, op=dist.ReduceOp.MAX, purpose="guard")
        failed, some_done, some_not = flags.tolist()
        if failed or (some_done and some_not):
            self.over = True
            raise failure or PeerFailedError("another rank failed" if failed else "the ranks read different weights")

    def __enter__(self) -> CollectiveReads:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        if self.over or (value is not None and not isinstance(value, Exception)):
            return
        self._agree(value, done=value is None)
