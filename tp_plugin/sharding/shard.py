"""Shard a model in place: classes change, ``nn.Parameter`` objects and their names stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import nn

from tp_plugin.config import TensorParallelConfig
from tp_plugin.errors import TensorParallelError, agree
from tp_plugin.layers.linear import is_conv1d
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh
from tp_plugin.param_info import layout_of
from tp_plugin.plans import Plan, plan_as
from tp_plugin.plans import plan as p
from tp_plugin.sharding import adapters
from tp_plugin.sharding.adapters import shard_param_
from tp_plugin.sharding.apply_plan import apply_plan, finder, placed_parameters
from tp_plugin.sharding.full_tensors import take_full_tensors
from tp_plugin.sharding.hooks import guard, guard_parts, guard_shapes
from tp_plugin.sharding.inputs import bring_in_step
from tp_plugin.sharding.pre_shard_state import remembering
from tp_plugin.sharding.preconditions import refuse_hooks, unmet_precondition
from tp_plugin.sharding.state import Sharding, mark_parts, note_state, state_of
from tp_plugin.sharding.sync_params import sync_params


def shard_in_place(model: nn.Module, config: TensorParallelConfig, mesh: ParallelMesh) -> Sharding:
    """Shard ``model`` over ``mesh``'s TP group; a collective call over the world.

    Every check precedes the first change, and fails on all ranks together. Parameters that differ between the ranks of
    a TP group are taken from its rank 0. A model with the same sharding is left as it is. Inferred rules are applied
    untested: :func:`tp_plugin.step_guard.trial.shard_proven` tries them first.

    Raises:
        TensorParallelError: the model cannot be sharded.
    """
    known = state_of(model)
    if known is not None:
        agree(
            None
            if known.mesh.tp_size == mesh.tp_size
            else f"the model is sharded {known.mesh.tp_size} ways already and cannot be sharded {mesh.tp_size} ways; "
            "build it again."
        )
        return known
    plan = planned(model, config, mesh)
    equalised = sync_params(model, mesh)
    shapes = {name: tuple(param.shape) for name, param in adapters.bare_of(model).named_parameters()}
    with adapters.taken_out(model) as (bare, copies):
        for param, layout in placed_parameters(plan, finder(bare, copies)):
            shard_param_(param, layout, mesh)
    return install_sharded(model, plan, config, mesh, shapes, equalised)


def planned(model: nn.Module, config: TensorParallelConfig, mesh: ParallelMesh, *, unread: bool = False) -> Plan:
    """The plan of ``model`` after all checks; a collective call, nothing is changed.

    Args:
        unread: parameters may be on ``meta``, to be read from a checkpoint later.

    Raises:
        TensorParallelError: a check failed, raised on every rank.
    """
    plan, error = None, unmet_precondition(model, unread=unread)
    if error is None:
        try:
            plan = _plan(model, config, mesh)
        except TensorParallelError as refused:
            error = str(refused)
    agree(error)
    assert plan is not None
    return plan


def _plan(model: nn.Module, config: TensorParallelConfig, mesh: ParallelMesh) -> Plan:
    with adapters.taken_out(model) as (bare, copies):
        plan = plan_as(bare, dataclasses.replace(config, tp_size=mesh.tp_size))
        refuse_hooks(plan, finder(bare, copies))
    library = adapters.of(model)
    objection = None if library is None else library.objection(bare, plan)
    if objection:
        raise TensorParallelError(objection)
    return plan


def install_sharded(
    model: nn.Module,
    plan: Plan,
    config: TensorParallelConfig,
    mesh: ParallelMesh,
    shapes: Mapping[str, tuple[int, ...]],
    equalised: Sequence[str] = (),
) -> Sharding:
    """Install classes, hooks and the record in a model whose sharded parameters are this rank's shards already.

    Args:
        shapes: full shape of every parameter of the bare model, each tied one once.
        equalised: names of tensors that differed between the ranks and were taken from rank 0.
    """
    with remembering(model):
        with adapters.taken_out(model) as (bare, copies):
            find = finder(bare, copies)
            linears = sum(isinstance(m, nn.Linear) or is_conv1d(m) for m in bare.modules())
            for param, layout in placed_parameters(plan, find):
                adapters.attach_layout(param, layout, mesh)
            apply_plan(bare, plan, find, mesh, config)
        library = adapters.of(model)
        if library is not None:
            library.shard_adapters(bare, mesh)
        bring_in_step(bare, mesh)  # later draws, such as the order of the data, are the same on all ranks
        guard(bare, mesh, config)
        guard_shapes(bare, plan, mesh)
        guard_parts(bare, plan)
        sharded = len(plan.names(p.COLUMN, p.COLUMN_GATHER, p.ROW, p.ROW_SPLIT))
        counts = sharded, linears - len(plan.names(p.VOCAB_HEAD))
        record = Sharding(plan, mesh, config, layouts_of(bare), shapes, counts, tuple(equalised))
        note_state(bare, record)
        mark_parts(bare, record)
        take_full_tensors(bare, mesh)
    return record


def layouts_by_name(model: nn.Module, plan: Plan) -> dict[str, ShardLayout]:
    """Layout of each parameter that ``plan`` shards, by every name it has."""
    found = {id(param): layout for param, layout in placed_parameters(plan, finder(model, ()))}
    tensors = model.named_parameters(remove_duplicate=False)
    return {name: found[id(param)] for name, param in tensors if id(param) in found}


def layouts_of(model: nn.Module) -> dict[str, ShardLayout]:
    """Layout of each sharded parameter of ``model``, by every name it has."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: layout for name, param in named if (layout := layout_of(param)) is not None}
