"""Random states: equal in a group once accelerate knows its degree, and restored after a change of topology.

A script may shuffle its data set without a seed before its model is sharded. ``load_state`` assigns states by process
index, which is another data-parallel rank's under another topology; each rank's state in the checkpoint is restored.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from tp_plugin.integrations.accelerate.degree import tp_size
from tp_plugin.integrations.features import ACCELERATE
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.mesh import ParallelMesh, take_device
from tp_plugin.sharding.inputs import generators_in_step
from tp_plugin.weights.gather import unwrapped
from tp_plugin.weights.rng_state import forget, restore_again

upstream = Upstream(ACCELERATE)
_STARTED: weakref.WeakSet[Any] = weakref.WeakSet()  # worlds whose groups have one random state


def start_in_step(degree: int, device: torch.device) -> None:
    """Give each group of ``degree`` neighbours the random states of its first rank, once; a collective call."""
    known = dist.is_initialized() and dist.group.WORLD not in _STARTED
    if degree == 1 or not known or dist.get_world_size() % degree:  # refused later, with a message
        return
    _STARTED.add(dist.group.WORLD)
    take_device()
    generators_in_step(device, ParallelMesh.create(degree))


@upstream.patch(Accelerator, "__init__", None, "a group's random states are one from then on")
def _init(original: Callable[..., None], self: Accelerator, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    start_in_step(tp_size(), self.device)


@upstream.patch(
    Accelerator, "load_state", ["input_dir", "load_kwargs"], "random states of another topology are set after it"
)
def _load_state(original: Callable[..., Any], self: Accelerator, *args: Any, **kwargs: Any) -> Any:
    models = [unwrapped(model) for model in self._models]
    for model in models:
        forget(model)  # of a load before this one
    found = original(self, *args, **kwargs)
    for model in models:
        restore_again(model)
    return found
