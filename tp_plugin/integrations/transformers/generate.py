"""``generate()`` of a sharded model is one call of all ranks of a TP group, and fails with a message where it is not.

Every rank samples each token itself, from full logits. Ranks with other prompts, options or random states would feed
each other tokens of different texts without an error. The ranks also stop together, as stopping depends on the tokens.
A clock (``max_time``) or a criterion of the user's may depend on more: there the group's rank 0 decides.
"""

from __future__ import annotations

import contextvars
import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.continuous_batching import ContinuousMixin

from tp_plugin.collectives import all_gather, broadcast_
from tp_plugin.errors import TensorParallelError, meet
from tp_plugin.integrations.features import GENERATION
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.mesh import ParallelMesh, comm_device
from tp_plugin.sharding.inputs import bring_in_step, prints_of

upstream = Upstream(GENERATION)

LATE_S = 60.0
"""Seconds after which a rank that waits for its peers logs the call that it waits in."""

_GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes of torch.compile that capture CUDA graphs."""
_OF_TOKENS = (MaxLengthCriteria, EosTokenCriteria, StopStringCriteria)

_MESH: contextvars.ContextVar[ParallelMesh | None] = contextvars.ContextVar(
    "mesh of the model that generates", default=None
)


def generating_mesh(model: torch.nn.Module) -> ParallelMesh | None:
    """Return the mesh of the sharded layers in ``model``, None without any. (A PEFT model's base has no record.)"""
    found = (module.__dict__.get("tp_mesh") for module in model.modules())
    return next((mesh for mesh in found if mesh is not None), None)


@upstream.patch(GenerationMixin, "generate", ["inputs", "generation_config"], "every rank of a TP group has to call it")
def _generate(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    mesh = generating_mesh(self)
    if mesh is None or mesh.tp_group is None:
        return original(self, *args, **kwargs)
    meet("generate()", LATE_S, mesh.tp_group)
    _compare(args, kwargs, mesh)
    bring_in_step(self, mesh)
    token = _MESH.set(mesh)  # for an assistant too, which each rank runs for itself
    try:
        return original(self, *args, **kwargs)
    finally:
        _MESH.reset(token)


@upstream.patch(
    GenerationMixin,
    "_get_stopping_criteria",
    ["generation_config", "stopping_criteria", "tokenizer"],
    "ranks whose clocks disagree would not stop together",
)
def _get_stopping_criteria(
    original: Callable[..., StoppingCriteriaList], self: Any, *args: Any, **kwargs: Any
) -> StoppingCriteriaList:
    found, mesh = original(self, *args, **kwargs), _MESH.get()
    if mesh is None:
        return found
    return StoppingCriteriaList(one if isinstance(one, _OF_TOKENS) else _OfFirstRank(one, mesh) for one in found)


@upstream.patch(
    GenerationMixin,
    "_valid_auto_compile_criteria",
    ["model_kwargs", "generation_config"],
    "it would capture collectives in CUDA graphs",
)
def _valid_auto_compile_criteria(
    original: Callable[..., bool], self: Any, model_kwargs: dict[str, Any], generation_config: Any
) -> bool:
    """Compile without CUDA graphs, and only where the user asks for it.

    With a static cache transformers compiles forwards on GPUs, by default as CUDA graphs. Collectives would be captured
    in them, which is untested.
    """
    would = original(self, model_kwargs, generation_config)
    if _MESH.get() is None or not would:
        return would
    asked = generation_config.compile_config
    if asked is not None and asked.backend == "inductor" and asked.mode in _GRAPHS:
        generation_config.compile_config = copy.copy(asked)
        generation_config.compile_config.mode = "default"
    return asked is not None


class _OfFirstRank(StoppingCriteria):
    """A criterion whose result may differ between ranks: all evaluate it, and the TP group uses its rank 0's result."""

    def __init__(self, criterion: Callable[..., Any], mesh: ParallelMesh) -> None:
        self.criterion, self.mesh = criterion, mesh
        if hasattr(criterion, "eos_token_id"):  # with it transformers pads finished texts
            self.eos_token_id = criterion.eos_token_id

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = torch.as_tensor(self.criterion(input_ids, scores, **kwargs), dtype=torch.bool, device=input_ids.device)
        sent = done.expand(len(input_ids)).to(comm_device(self.mesh.tp_group), torch.uint8, copy=True).contiguous()
        broadcast_(sent, self.mesh.tp_group, purpose="stop")
        return sent.to(input_ids.device, torch.bool)


@upstream.patch(
    ContinuousMixin, "init_continuous_batching", ["generation_config"], "its cache and scheduler do not know of shards"
)
def _init_continuous_batching(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    if generating_mesh(self) is not None:
        raise TensorParallelError(
            "continuous batching (generate_batch, a paged cache) schedules requests on each rank alone, which a "
            "tensor-parallel model cannot follow; use generate()."
        )
    return original(self, *args, **kwargs)


def _compare(args: tuple, kwargs: dict[str, Any], mesh: ParallelMesh) -> None:
    """Raise on every rank of the TP group unless all gave the same prompts and options."""

    def plain(value: Any) -> Any:
        return value.to_json_string() if isinstance(value, GenerationConfig) else value

    tree = [plain(value) for value in args], {name: plain(value) for name, value in sorted(kwargs.items())}
    prints = torch.stack(prints_of(tree, comm_device(mesh.tp_group)))
    found = torch.stack(all_gather(prints, mesh.tp_group, purpose="generate check"))
    if (found != found[0]).any():
        raise TensorParallelError(
            "the ranks of a tensor-parallel group called generate() with different prompts or options; split prompts "
            "by dp rank = rank // tp_size, as Accelerator.split_between_processes does."
        )
