"""``generate()`` of a sharded model is one call of all ranks of a TP group, and says so where it is not.

Each token is sampled by every rank for itself, from logits that are whole on each. Ranks with other prompts, options or
random states would feed each other tokens of different texts, and nothing would fail.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.continuous_batching import ContinuousMixin

from tp_plugin.collectives import all_gather
from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.contract import Patches, contract
from tp_plugin.mesh import ParallelMesh
from tp_plugin.sharding.equal import comm_device
from tp_plugin.sharding.inputs import bring_in_step, prints_of

LATE_S = 60.0
"""After how many seconds a rank that waits for its peers says what it waits for."""


def check_contracts() -> None:
    contract(GenerationMixin, "generate", ["inputs", "generation_config"], "every rank of a TP group has to call it")
    batching = "its cache and scheduler do not know of shards"
    contract(ContinuousMixin, "init_continuous_batching", ["generation_config"], batching)


def install(patches: Patches) -> None:
    patches.replace(GenerationMixin, "generate", _generate_method)
    patches.replace(ContinuousMixin, "init_continuous_batching", _refusing)


def mesh_of(model: torch.nn.Module) -> ParallelMesh | None:
    """The mesh of the sharded layers in ``model``; None if there are none. A PEFT model's inner one has no record."""
    found = (module.__dict__.get("tp_mesh") for module in model.modules())
    return next((mesh for mesh in found if mesh is not None), None)


def _generate_method(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        mesh = mesh_of(self)
        if mesh is not None and mesh.tp_group is not None:
            with _saying_what_it_waits_for(mesh):
                _compare(args, kwargs, mesh)
                bring_in_step(self, mesh)
        return original(self, *args, **kwargs)

    return generate


def _refusing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
        if mesh_of(self) is not None:
            raise TensorParallelError(
                "continuous batching (generate_batch, a paged cache) schedules requests on each rank for itself, which "
                "a tensor-parallel model cannot follow; use generate()."
            )
        return original(self, *args, **kwargs)

    return init_continuous_batching


def _compare(args: tuple, kwargs: dict[str, Any], mesh: ParallelMesh) -> None:
    """Raise on every rank of the TP group unless all brought the same prompts and options."""

    def plain(value: Any) -> Any:
        return value.to_json_string() if isinstance(value, GenerationConfig) else value

    tree = [plain(value) for value in args], {name: plain(value) for name, value in sorted(kwargs.items())}
    prints = torch.stack(prints_of(tree, comm_device(mesh.tp_group)))
    found = torch.stack(all_gather(prints, mesh.tp_group, purpose="generate check"))
    if (found != found[0]).any():
        raise TensorParallelError(
            "the ranks of a tensor-parallel group called generate() with different prompts or options; give "
            "neighbouring ranks the same (split prompts by dp rank = rank // tp_size, as "
            "Accelerator.split_between_processes does)."
        )


@contextlib.contextmanager
def _saying_what_it_waits_for(mesh: ParallelMesh) -> Iterator[None]:
    def say() -> None:
        print(
            f"tp_plugin: WARNING: generate() on rank {dist.get_rank()} waits for the other ranks of its "
            f"tensor-parallel group ({dist.get_process_group_ranks(mesh.tp_group)}); every one of them has to call it, "
            "so call it outside of `if rank == 0`.",
            flush=True,
        )

    timer = threading.Timer(LATE_S, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
