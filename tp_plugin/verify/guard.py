"""Nothing that was only inferred is trained on: a small copy of the model is tried first, on the very ranks."""

from __future__ import annotations

from typing import Any

from torch import nn

from tp_plugin.config import TensorParallelConfig
from tp_plugin.errors import TensorParallelError
from tp_plugin.mesh import ParallelMesh
from tp_plugin.plans import plan_for
from tp_plugin.sharding import Sharding, adapters, shard_in_place, state_of
from tp_plugin.sharding.obstacles import obstacle
from tp_plugin.verify.check import examined
from tp_plugin.verify.first_step import StepGuard, guard_of


def shard_proven(model: nn.Module, config: TensorParallelConfig, mesh: ParallelMesh) -> Sharding:
    """:func:`~tp_plugin.sharding.shard_in_place`, after a trial of whatever rules were inferred.

    The trial runs a scaled-down copy of the model's config forward and backward, sharded over ``mesh`` and whole, and
    compares loss and gradients; no weight of ``model`` is touched. Inferred rules that it does not reach are
    dropped. A collective call over the world.

    Raises:
        TensorParallelError: as ``shard_in_place``; or the trial failed, naming the module and its rule, or could not
            be made.
    """
    return watched(model, shard_in_place(model, proven(model, config, mesh), mesh))


def watched(model: nn.Module, record: Sharding) -> Sharding:
    """The record of a sharded model, whose first step will be checked; see :mod:`tp_plugin.verify.first_step`."""
    if guard_of(model) is None and record.mesh.tp_size > 1:
        StepGuard(adapters.bare_of(model), record)
    return record


def proven(
    model: nn.Module, config: TensorParallelConfig, mesh: ParallelMesh, *, unread: bool = False
) -> TensorParallelConfig:
    """``config`` with what the trial of inferred rules taught; itself where there is nothing to try. Collective.

    ``unread``: the model's parameters are read later; the trial needs its config alone.
    """
    if config.infer != "checked" or mesh.tp_size == 1 or state_of(model) is not None or obstacle(model, unread=unread):
        return config  # an obstacle shard_in_place will name, on all ranks together
    with adapters.taken_out(model) as (bare, _):
        inferred = _is_inferred(bare, config)
    return _tried(bare, config, mesh) if inferred else config


def _is_inferred(model: nn.Module, config: TensorParallelConfig) -> bool:
    try:
        return bool(plan_for(model, config.tp_size, config.plan).inferred())
    except TensorParallelError:
        return False


def _tried(model: nn.Module, config: TensorParallelConfig, mesh: ParallelMesh) -> TensorParallelConfig:
    name = type(model).__name__
    remedy = (
        "give rules for it in the 'plan' of the tp_plugin block ('replicated' for what should stay whole), or set "
        "'infer' there to 'off'"
    )
    own_config: Any = getattr(model, "config", None)
    if own_config is None:
        raise TensorParallelError(
            f"the rules of {name} were inferred from its shapes and cannot be tried without a transformers config to "
            f"build a small copy from; {remedy}, or to 'trusted' to use them as they are."
        )
    found, config = examined(type(model), own_config, config, mesh)
    if found.verdict == "equal":
        return config
    if found.verdict == "untested":
        raise TensorParallelError(
            f"the rules of {name} were inferred from its shapes and could not be tried ({found.sentence}); {remedy}, "
            "or to 'trusted' to use them as they are."
        )
    raise TensorParallelError(
        f"the rules inferred from the shapes of {name} are wrong, a small copy of it shows: {found.sentence}; {remedy}."
    )
