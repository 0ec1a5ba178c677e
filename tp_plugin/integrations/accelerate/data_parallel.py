"""A TP group counts as one process where accelerate counts processes and means readers of distinct data.

- ``Accelerator.num_processes`` is a factor of losses (which loops divide by a gathered token count) and of a schedule's
  steps. As in ``gather``, a TP group counts once. The state beneath (``accelerator.state``, ``PartialState``) counts
  ranks, that is hardware.
- ``AcceleratedScheduler.step`` steps once for each process, because each reads its own share of the data.
- ``set_seed(device_specific=True)`` adds the process index. The ranks of a TP group must draw the same numbers wherever
  the model is replicated.
- ``split_between_processes`` distributes prompts for inference.
- A stream that rank 0 reads is distributed to TP groups. With a TP mesh accelerate gives one batch to every rank, the
  data-parallel ones included, so dp replicas would silently train on one batch.
- ``prepare()`` makes a new TP mesh with process groups each time, and Trainer prepares a loader for every evaluation:
  one mesh a process is made instead.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import accelerate.scheduler
import accelerate.utils.random
import torch.distributed.device_mesh
from accelerate import Accelerator, ParallelismConfig
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.state import AcceleratorState, PartialState

from tp_plugin.integrations.accelerate.degree import tp_size
from tp_plugin.integrations.features import ACCELERATE, STREAMS
from tp_plugin.integrations.upstream import Upstream

upstream = Upstream(ACCELERATE)
_RANKS: contextvars.ContextVar[bool] = contextvars.ContextVar("Accelerator.num_processes counts ranks", default=False)


class _ByGroup:
    """Counts a TP group as one process, in front of a state of accelerate's."""

    @property
    def num_processes(self) -> int:
        return self.__dict__["num_processes"] // tp_size()

    @property
    def process_index(self) -> int:
        return self.__dict__["process_index"] // tp_size()


class DataParallelState(_ByGroup, AcceleratorState):
    """The ``AcceleratorState`` of this process with a TP group counted as one process."""


class DataParallelProcess(_ByGroup, PartialState):
    """The ``PartialState`` of this process with a TP group counted as one process."""


_COUNTS = "{} counts processes, and a TP group must count as one"


def _by_group(_original: Any) -> Any:
    return DataParallelState


_SCHEDULER, _SEEDS = _COUNTS.format("AcceleratedScheduler.step"), _COUNTS.format("set_seed(device_specific=True)")
upstream.replace(accelerate.scheduler, "AcceleratorState", None, _SCHEDULER, make=_by_group)
upstream.replace(accelerate.utils.random, "AcceleratorState", None, _SEEDS, make=_by_group)


@upstream.patch(PartialState, "split_between_processes", ["inputs", "apply_padding"], _COUNTS.format("it"))
def _split_between_processes(
    original: Callable[..., Any], self: PartialState, inputs: Any, apply_padding: bool = False
) -> contextlib.AbstractContextManager:
    return original(DataParallelProcess() if tp_size() > 1 else self, inputs, apply_padding)


@upstream.patch(Accelerator, "num_processes", [], "a loop that divides by it what was gathered would be tp times off")
def _num_processes(original: Callable[..., int], self: Accelerator) -> int:
    ranks = original(self)
    return ranks if _RANKS.get() else ranks // tp_size()


_NEED_RANKS = "it needs the number of ranks from Accelerator.num_processes"
_LOADER = ["data_loader", "device_placement", "slice_fn_for_dispatch"]


@upstream.patch(Accelerator, "is_last_process", [], _NEED_RANKS)
@upstream.patch(Accelerator, "prepare_data_loader", _LOADER, _NEED_RANKS)
@upstream.patch(ParallelismConfig, "_validate_accelerator", ["accelerator"], _NEED_RANKS)
def _counting_ranks(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function that compares ``num_processes`` with ranks, or divides it by the TP degree itself."""
    token = _RANKS.set(True)
    try:
        return original(*args, **kwargs)
    finally:
        _RANKS.reset(token)


# ---- streams --------------------------------------------------------------------------------------------------------

_STREAMS = "streams are distributed to tensor-parallel groups by its state.num_processes, submesh_tp and slice_fn"
streams = Upstream(STREAMS)
streams.needs(DataLoaderDispatcher, "_fetch_batches", ["iterator"], _STREAMS)


@streams.patch(DataLoaderDispatcher, "__init__", ["dataset", "split_batches"], _STREAMS)
def _init_dispatcher(original: Callable[..., None], self: DataLoaderDispatcher, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    degree = tp_size()
    if degree > 1:
        self.submesh_tp = None  # with it, one batch goes to all ranks
        self.state = _StreamReaders()
        self.slice_fn = functools.partial(_share, self.slice_fn, degree)


class _StreamReaders(PartialState):
    """The state of this process with TP groups counted; its ``process_index`` is the rank, see :func:`_share`."""

    num_processes = _ByGroup.num_processes


def _share(original: Callable[..., Any], degree: int, data: Any, part: slice, process_index: int, **kwargs: Any) -> Any:
    """Slice for this rank's group; accelerate computed that of its rank. A ``part`` that starts at 0 is kept."""
    if part.start:
        rows, group = part.stop - part.start, process_index // degree
        part = slice(group * rows, (group + 1) * rows)
    return original(data, part, process_index=process_index, **kwargs)


# ---- one mesh a process ---------------------------------------------------------------------------------------------

upstream.needs(Accelerator, "_prepare_device_mesh", [], "data loaders give the ranks of this mesh one batch")
_SHAPE = ["device_type", "mesh_shape"]
upstream.needs(torch.distributed.device_mesh, "init_device_mesh", _SHAPE, "to reuse the TP mesh")


@upstream.patch(Accelerator, "_prepare_deepspeed", None, "it makes a TP mesh every time")
def _prepare_deepspeed(original: Callable[..., Any], self: Accelerator, *args: Any) -> Any:
    degree = tp_size()
    if degree == 1:
        return original(self, *args)
    with _reused(getattr(self.state, "ds_device_mesh", None), degree):
        return original(self, *args)


@contextlib.contextmanager
def _reused(mesh: Any, degree: int) -> Iterator[None]:
    """Have ``init_device_mesh`` return ``mesh`` again when asked for a TP mesh of this size."""
    if mesh is None:
        yield
        return
    module = torch.distributed.device_mesh
    original = module.init_device_mesh

    @functools.wraps(original)
    def init_device_mesh(device_type: str, mesh_shape: tuple[int, ...], **kwargs: Any) -> Any:
        if tuple(mesh_shape) == (degree,) and kwargs.get("mesh_dim_names") == ("tp",):
            return mesh
        return original(device_type, mesh_shape, **kwargs)

    module.init_device_mesh = init_device_mesh
    try:
        yield
    finally:
        module.init_device_mesh = original
