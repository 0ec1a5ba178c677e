"""Where accelerate counts processes and means readers of distinct data: learning-rate schedules, seeds, prompts.

``Accelerator.num_processes`` is what loops multiply a loss by, before they divide it by a gathered token count, and the
steps of a schedule; as ``gather`` does, it counts a TP group once. The state beneath (``accelerator.state``,
``PartialState``) counts ranks, for whoever means hardware.

``AcceleratedScheduler.step`` steps as often as there are processes, because each reads that fraction of the data; a TP
group reads one share. ``set_seed(device_specific=True)`` adds the process index, and the ranks of a TP group must draw
the same numbers wherever the model is replicated. ``split_between_processes`` deals prompts out for inference.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable
from typing import Any

import accelerate.scheduler
import accelerate.utils.random
from accelerate import Accelerator, ParallelismConfig
from accelerate.state import AcceleratorState, PartialState

from tp_plugin.integrations.accelerate.degree import tp_size
from tp_plugin.integrations.contract import Patches, contract

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
    """The state of this process with a TP group counted as one process."""


class DataParallelProcess(_ByGroup, PartialState):
    """The same of the state beneath."""


def check_contracts() -> None:
    why = "{} counts processes, and a TP group must count as one"
    contract(accelerate.scheduler, "AcceleratorState", None, why.format("AcceleratedScheduler.step"))
    contract(accelerate.utils.random, "AcceleratorState", None, why.format("set_seed(device_specific=True)"))
    contract(PartialState, "split_between_processes", ["inputs", "apply_padding"], why.format("it"))
    contract(Accelerator, "num_processes", [], "a loop that divides by it what was gathered would be tp times off")
    ranks = "it needs the number of ranks from Accelerator.num_processes"
    contract(Accelerator, "is_last_process", [], ranks)
    contract(Accelerator, "prepare_data_loader", ["data_loader", "device_placement", "slice_fn_for_dispatch"], ranks)
    contract(ParallelismConfig, "_validate_accelerator", ["accelerator"], ranks)


def install(patches: Patches) -> None:
    for module in (accelerate.scheduler, accelerate.utils.random):
        patches.replace(module, "AcceleratorState", _by_group)
    patches.replace(PartialState, "split_between_processes", _split_between_processes_method)
    patches.replace(Accelerator, "num_processes", _num_processes_property)
    patches.replace(Accelerator, "is_last_process", lambda original: property(_counting_ranks(original.fget)))
    patches.replace(Accelerator, "prepare_data_loader", _counting_ranks)
    patches.replace(ParallelismConfig, "_validate_accelerator", _counting_ranks)


def _by_group(_original: Any) -> Any:
    return DataParallelState


def _split_between_processes_method(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def split_between_processes(
        self: PartialState, inputs: Any, apply_padding: bool = False
    ) -> contextlib.AbstractContextManager:
        return original(DataParallelProcess() if tp_size() > 1 else self, inputs, apply_padding)

    return split_between_processes


def _num_processes_property(original: property) -> property:
    def num_processes(self: Accelerator) -> int:
        """How many readers of distinct data there are: processes, a TP group counted once."""
        ranks: int = original.__get__(self)
        return ranks if _RANKS.get() else ranks // tp_size()

    return property(num_processes)


def _counting_ranks(original: Callable[..., Any]) -> Callable[..., Any]:
    """What compares ``Accelerator.num_processes`` with ranks, or divides it by the TP degree itself."""

    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        token = _RANKS.set(True)
        try:
            return original(*args, **kwargs)
        finally:
            _RANKS.reset(token)

    return function
