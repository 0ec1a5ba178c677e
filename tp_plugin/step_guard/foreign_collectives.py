"""Find collectives of a user's own code over a TP group, whose ranks it takes for ranks with other data.

A loss that gathers negatives over all ranks gets every row once a TP rank. Two checks find it in the first step. The
guard runs the unsharded view in a world of data-parallel ranks only, so a loss that depends on the copies differs
there. A hand-written loop's loss is not run there, so collecting rows with a gradient is refused between its first
forward and backward.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn
from torch.utils._pytree import tree_leaves

from tp_plugin.errors import TensorParallelError
from tp_plugin.mesh import ParallelMesh

ROWS = (
    *("all_gather", "all_gather_into_tensor", "all_gather_single", "all_gather_coalesced", "all_gather_object"),
    *("gather", "gather_object", "all_to_all", "all_to_all_single", "scatter", "scatter_object_list"),
    *("reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single", "all_gather_tensor"),
    *("all_gather_tensor_autograd", "all_gather_single_autograd", "all_to_all_single_autograd"),
    *("reduce_scatter_tensor_autograd", "reduce_scatter_single_autograd"),
)
"""Functions that collect or distribute rows, and take each rank's for other rows."""
OTHERS = ("all_reduce", "all_reduce_coalesced", "reduce", "broadcast", "broadcast_object_list", "barrier")
"""Functions that are right over all ranks: means, copies of one rank's tensor."""
MESSAGES = ("batch_isend_irecv", "send", "recv", "isend", "irecv")
PLACES: list[ModuleType] = [dist, torch.distributed.nn, torch.distributed.nn.functional]
"""Modules whose functions are looked up by these names; integrations add to them."""
_TRUSTED = {"tp_plugin", "deepspeed", "accelerate", "transformers", "peft"}
_BETWEEN = {"torch", "functools", "contextlib"}  # they only pass a call on


def user_of_call() -> FrameType | None:
    """Return the frame of user code that made this call; None if a library that knows tensor parallelism made it."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        root = name.partition(".")[0]
        if root not in _BETWEEN and name != __name__ and not name.startswith("deepspeed.comm"):
            return None if root in _TRUSTED else frame
        frame = frame.f_back
    return None


def holds_peers(group: Any, mesh: ParallelMesh) -> bool:
    """Return True if ``group`` contains several ranks of this rank's TP group and is not that group."""
    if mesh.tp_group is None:
        return False
    if group is None or group is dist.group.WORLD or group == getattr(dist.group.WORLD, "group_name", None):
        return True  # also where it is the TP group, which a user means by its own name only
    if group is mesh.tp_group:
        return False
    if isinstance(group, tuple):  # a mesh and the number of a dimension
        group = group[0].get_group(group[1])
    elif hasattr(group, "get_group"):
        group = group.get_group()
    ranks = dist.get_process_group_ranks(group) if isinstance(group, dist.ProcessGroup) else group
    if isinstance(ranks, str):
        return False
    return len(set(ranks) & set(dist.get_process_group_ranks(mesh.tp_group))) > 1


class CollectiveWatch:
    """From a forward to its backward, refuses to collect rows with a gradient over ranks of a TP group.

    It replaces functions of PyTorch, so one watch is open in a process: the latest forward's. A refused call raises
    TensorParallelError on every rank that makes it, and closes the watch.
    """

    _open: CollectiveWatch | None = None

    def __init__(self, mesh: ParallelMesh) -> None:
        self.mesh, self._patches = mesh, contextlib.ExitStack()

    def open(self) -> None:
        if CollectiveWatch._open is not None:
            CollectiveWatch._open.close()
        CollectiveWatch._open = self
        # isend and irecv stay: batch_isend_irecv knows its messages by their identity
        self._patches.enter_context(_replaced((*ROWS, *MESSAGES[:3]), self._watched))

    def close(self) -> None:
        self._patches.close()
        if CollectiveWatch._open is self:
            CollectiveWatch._open = None

    def _watched(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            user, given = user_of_call(), _group(original, args, kwargs)
            if user is not None and holds_peers(given, self.mesh) and _carries_rows((args, kwargs)):
                self.close()
                raise TensorParallelError(sentence(name, user, self.mesh))
            return original(*args, **kwargs)

        return call


@contextlib.contextmanager
def without_peers(mesh: ParallelMesh) -> Iterator[list[str]]:
    """Let user code run in a world of data-parallel ranks while open; yields sentences about its calls.

    Collectives over groups with several ranks of a TP group go over the data-parallel group. Point-to-point messages
    raise.
    """
    met: list[str] = []
    peers, replicas = mesh.tp_size, mesh.dp_group

    def answer(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            user = user_of_call()
            if user is None or (name not in MESSAGES and not holds_peers(_group(original, args, kwargs), mesh)):
                return original(*args, **kwargs)
            if name in MESSAGES:
                raise RuntimeError(f"{name} sends to one rank, which has no counterpart without tensor parallelism")
            if name in ROWS:
                met.append(sentence(name, user, mesh))
            bound = inspect.signature(original).bind(*args, **kwargs)
            bound.arguments["group"] = replicas
            for rank in ("src", "dst"):
                if bound.arguments.get(rank) is not None:
                    bound.arguments[rank] = dist.get_global_rank(replicas, bound.arguments[rank])  # type: ignore[arg-type]
            return original(*bound.args, **bound.kwargs)

        return call

    if replicas is None or peers == 1:
        yield met
        return
    with _replaced((*ROWS, *OTHERS, *MESSAGES, "get_world_size", "get_rank"), answer):
        yield met


def sentence(name: str, user: FrameType, mesh: ParallelMesh) -> str:
    """Describe a call that is wrong, and its fix."""
    where = f"{Path(user.f_code.co_filename).name}, line {user.f_lineno}"
    return (
        f"{name} ({where}) collects over all ranks, and the {mesh.tp_size} ranks of a tensor-parallel group hold the "
        f"same rows, which would count {mesh.tp_size} times: use accelerator.gather, or pass "
        "group=deepspeed.utils.groups.get_data_parallel_group() and that group's size and rank (detach() rows that "
        "are collected for a metric only)"
    )


def _group(original: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    if "group" in kwargs:
        return kwargs["group"]
    parameters = list(inspect.signature(original).parameters)
    place = parameters.index("group") if "group" in parameters else len(args)
    return args[place] if place < len(args) else None


def _carries_rows(given: Any) -> bool:
    """Return True if more than one number with a gradient is collected."""
    leaves = [getattr(leaf, "tensor", leaf) for leaf in tree_leaves(given)]  # a message holds its tensor
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad and leaf.numel() > 1 for leaf in leaves)


@contextlib.contextmanager
def _replaced(names: Iterable[str], make: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    patches: list[tuple[ModuleType, str, Any, Any]] = []
    for place in PLACES:
        for name in names:
            original = vars(place).get(name)
            if callable(original):
                ours = functools.wraps(original)(make(name, original))
                setattr(place, name, ours)
                patches.append((place, name, original, ours))
    try:
        yield
    finally:
        for place, name, original, ours in reversed(patches):
            if vars(place).get(name) is ours:
                setattr(place, name, original)
