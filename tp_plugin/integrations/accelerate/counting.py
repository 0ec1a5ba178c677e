"""Where accelerate counts processes and means readers of distinct data: learning-rate schedules, seeds, prompts.

``AcceleratedScheduler.step`` steps as often as there are processes, because each reads that fraction of the data; a TP
group reads one share. ``set_seed(device_specific=True)`` adds the process index, and the ranks of a TP group must draw
the same numbers wherever the model is replicated. ``split_between_processes`` deals prompts out for inference.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import accelerate.scheduler
import accelerate.utils.random
from accelerate.state import AcceleratorState, PartialState

from tp_plugin.integrations.accelerate.degree import tp_size
from tp_plugin.integrations.contract import Patches, contract


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


def install(patches: Patches) -> None:
    for module in (accelerate.scheduler, accelerate.utils.random):
        patches.replace(module, "AcceleratorState", _by_group)
    patches.replace(PartialState, "split_between_processes", _split_between_processes_method)


def _by_group(_original: Any) -> Any:
    return DataParallelState


def _split_between_processes_method(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def split_between_processes(
        self: PartialState, inputs: Any, apply_padding: bool = False
    ) -> contextlib.AbstractContextManager:
        return original(DataParallelProcess() if tp_size() > 1 else self, inputs, apply_padding)

    return split_between_processes
