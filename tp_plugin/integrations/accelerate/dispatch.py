"""A stream that rank 0 reads is dealt out to TP groups, each group another share.

Accelerate does so for an ``IterableDataset``. With a TP mesh it hands the same batch to every rank, the data-parallel
ones included, so that dp replicas train on one batch and nothing says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from accelerate.data_loader import DataLoaderDispatcher
from accelerate.state import PartialState

from tp_plugin.integrations.accelerate.degree import tp_size
from tp_plugin.integrations.contract import Patches, contract


class _Readers(PartialState):
    """The state of this process, but with TP groups counted instead of processes."""

    @property
    def num_processes(self) -> int:
        return self.__dict__["num_processes"] // tp_size()


def check_contracts() -> None:
    why = "streams are dealt to tensor-parallel groups by its state.num_processes, submesh_tp and slice_fn"
    contract(DataLoaderDispatcher, "__init__", ["dataset", "split_batches"], why)
    contract(DataLoaderDispatcher, "_fetch_batches", ["iterator"], why)


def install(patches: Patches) -> None:
    patches.replace(DataLoaderDispatcher, "__init__", _init_method)


def _init_method(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: DataLoaderDispatcher, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        degree = tp_size()
        if degree > 1:
            self.submesh_tp = None  # what makes it repeat one batch for all
            self.state = _Readers()
            self.slice_fn = functools.partial(_share, self.slice_fn, degree)

    return __init__


def _share(original: Callable[..., Any], degree: int, data: Any, part: slice, process_index: int, **kwargs: Any) -> Any:
    """This rank's slice, where accelerate computed the one of its place in the world; ``part`` from 0 is kept."""
    if part.start:
        rows, group = part.stop - part.start, process_index // degree
        part = slice(group * rows, (group + 1) * rows)
    return original(data, part, process_index=process_index, **kwargs)
