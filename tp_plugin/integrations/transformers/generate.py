"""``generate()`` of a sharded model is one call of all ranks of a TP group, and says so where it is not.

Each token is sampled by every rank for itself, from logits that are whole on each. Ranks with other prompts, options or
random states would feed each other tokens of different texts, and nothing would fail. When to stop is a function of the
tokens too, except by a clock (``max_time``) or by whatever a criterion of the user's looks at: there one rank decides.
"""

from __future__ import annotations

import contextvars
import functools
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
from tp_plugin.integrations.contract import Patches, contract
from tp_plugin.mesh import ParallelMesh
from tp_plugin.sharding.equal import comm_device
from tp_plugin.sharding.inputs import bring_in_step, prints_of

LATE_S = 60.0
"""After how many seconds a rank that waits for its peers says what it waits for."""

_OF_TOKENS = (MaxLengthCriteria, EosTokenCriteria, StopStringCriteria)

_MESH: contextvars.ContextVar[ParallelMesh | None] = contextvars.ContextVar(
    "mesh of the model that writes", default=None
)


def check_contracts() -> None:
    contract(GenerationMixin, "generate", ["inputs", "generation_config"], "every rank of a TP group has to call it")
    clocks = "ranks whose clocks disagree would not stop together"
    contract(GenerationMixin, "_get_stopping_criteria", ["generation_config", "stopping_criteria", "tokenizer"], clocks)
    batching = "its cache and scheduler do not know of shards"
    contract(ContinuousMixin, "init_continuous_batching", ["generation_config"], batching)


def install(patches: Patches) -> None:
    patches.replace(GenerationMixin, "generate", _generate_method)
    patches.replace(GenerationMixin, "_get_stopping_criteria", _get_stopping_criteria_method)
    patches.replace(ContinuousMixin, "init_continuous_batching", _refusing)


def mesh_of(model: torch.nn.Module) -> ParallelMesh | None:
    """The mesh of the sharded layers in ``model``; None if there are none. A PEFT model's inner one has no record."""
    found = (module.__dict__.get("tp_mesh") for module in model.modules())
    return next((mesh for mesh in found if mesh is not None), None)


def _generate_method(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        mesh = mesh_of(self)
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

    return generate


def _get_stopping_criteria_method(original: Callable[..., StoppingCriteriaList]) -> Callable[..., StoppingCriteriaList]:
    @functools.wraps(original)
    def _get_stopping_criteria(self: Any, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        found, mesh = original(self, *args, **kwargs), _MESH.get()
        if mesh is None:
            return found
        return StoppingCriteriaList(one if isinstance(one, _OF_TOKENS) else _OfFirstRank(one, mesh) for one in found)

    return _get_stopping_criteria


class _OfFirstRank(StoppingCriteria):
    """A criterion that may come out differently on each rank: all ask it, the TP group takes its rank 0's answer."""

    def __init__(self, criterion: Callable[..., Any], mesh: ParallelMesh) -> None:
        self.criterion, self.mesh = criterion, mesh
        if hasattr(criterion, "eos_token_id"):  # then transformers pads what has ended
            self.eos_token_id = criterion.eos_token_id

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = torch.as_tensor(self.criterion(input_ids, scores, **kwargs), dtype=torch.bool, device=input_ids.device)
        sent = done.expand(len(input_ids)).to(comm_device(self.mesh.tp_group), torch.uint8, copy=True).contiguous()
        broadcast_(sent, self.mesh.tp_group, purpose="stop")
        return sent.to(input_ids.device, torch.bool)


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
