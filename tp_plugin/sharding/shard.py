"""Shard a model in place: classes change, ``nn.Parameter`` objects and their names stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from tp_plugin.config import TensorParallelConfig
from tp_plugin.errors import TensorParallelError, agree
from tp_plugin.layers import (
    ColumnParallel,
    ColumnParallelLinear,
    EachHead,
    ParallelExperts,
    Region,
    RowParallel,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    WideRMSNorm,
    count_once,
    enter_after,
    set_local,
    slice_heads,
    sum_at_exit,
    sum_partial_gradient,
)
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh
from tp_plugin.plans import Placement, Plan, plan_for
from tp_plugin.plans import plan as p
from tp_plugin.plans.checks import is_conv1d
from tp_plugin.sharding import adapters
from tp_plugin.sharding.adapters import cut
from tp_plugin.sharding.equal import make_equal
from tp_plugin.sharding.guards import guard, guard_attentions, guard_experts
from tp_plugin.sharding.obstacles import obstacle, refuse_hooks
from tp_plugin.sharding.original import remembering
from tp_plugin.sharding.state import ATTRIBUTE, Sharding, state_of

_CLASS_OF_STYLE: dict[str, type[nn.Module]] = {
    p.COLUMN: ColumnParallelLinear,
    p.COLUMN_GATHER: ColumnParallelLinear,
    p.ROW: RowParallelLinear,
    p.ROW_SPLIT: RowParallelLinear,
    p.EXPERTS: ParallelExperts,
    p.VOCAB_EMBEDDING: VocabParallelEmbedding,
    p.VOCAB_HEAD: VocabParallelHead,
    p.WIDE_NORM: WideRMSNorm,
    p.EACH_HEAD: EachHead,
}
"""Styles without a class leave the module's own: its parameters or their gradients are what changes."""
_MADE: dict[tuple[type, type], type] = {}


def shard_in_place(model: nn.Module, config: TensorParallelConfig, mesh: ParallelMesh) -> Sharding:
    """Shard ``model`` over ``mesh``'s TP group; a collective call over the world.

    Every check comes before the first change, and fails on all ranks together. Parameters that differ between the
    ranks of a TP group are taken from its rank 0. A model that is sharded alike already is left as it is. Inferred
    rules are taken as they are: :func:`tp_plugin.verify.guard.shard_proven` tries them first.

    Raises:
        TensorParallelError: what cannot be sharded and what to do about it.
    """
    known = state_of(model)
    if known is not None:
        agree(
            None
            if known.mesh.tp_size == mesh.tp_size
            else f"the model is sharded {known.mesh.tp_size} ways already and cannot be sharded {mesh.tp_size} ways; "
            "build it anew."
        )
        return known
    plan = planned(model, config, mesh)
    equalised = make_equal(model, mesh)
    shapes = {name: tuple(param.shape) for name, param in adapters.bare_of(model).named_parameters()}
    with adapters.taken_out(model) as (bare, twins):
        for param, layout in _layouts(plan, _finder(bare, twins)):
            cut(param, layout, mesh)
    return install(model, plan, config, mesh, shapes, equalised)


def planned(model: nn.Module, config: TensorParallelConfig, mesh: ParallelMesh, *, unread: bool = False) -> Plan:
    """The plan of ``model``, once no rank finds anything that speaks against it; a collective call, nothing is touched.

    Args:
        unread: the parameters need not be there yet (on ``meta``, in a checkpoint).

    Raises:
        TensorParallelError: on every rank together.
    """
    plan, error = None, obstacle(model, unread=unread)
    if error is None:
        try:
            plan = _plan(model, config, mesh)
        except TensorParallelError as refused:
            error = str(refused)
    agree(error)
    assert plan is not None
    return plan


def _plan(model: nn.Module, config: TensorParallelConfig, mesh: ParallelMesh) -> Plan:
    with adapters.taken_out(model) as (bare, twins):
        plan = plan_for(bare, mesh.tp_size, config.plan, inferring=config.infer != "off")
        refuse_hooks(plan, _finder(bare, twins))
    library = adapters.of(model)
    objection = None if library is None else library.objection(bare, plan)
    if objection:
        raise TensorParallelError(objection)
    return plan


def install(
    model: nn.Module,
    plan: Plan,
    config: TensorParallelConfig,
    mesh: ParallelMesh,
    shapes: Mapping[str, tuple[int, ...]],
    equalised: Sequence[str] = (),
) -> Sharding:
    """Classes, hooks and the record of a model whose sharded parameters are this rank's shards already.

    Args:
        shapes: full shape of every parameter of the bare model, each tied one once.
        equalised: names of tensors that differed between the ranks and were taken from one.
    """
    with remembering(model):
        with adapters.taken_out(model) as (bare, twins):
            find = _finder(bare, twins)
            linears = sum(isinstance(m, nn.Linear) or is_conv1d(m) for m in bare.modules())
            for param, layout in _layouts(plan, find):
                adapters.note(param, layout, mesh)
            _swap(bare, plan, find, mesh, config)
            _sum_partial(plan, find, mesh)
        library = adapters.of(model)
        if library is not None:
            library.lay(bare, mesh)
        guard(bare, mesh, config)
        if plan.regions:
            guard_attentions(bare)
        if plan.mixtures:
            guard_experts(bare)
        sharded = len(plan.names(p.COLUMN, p.COLUMN_GATHER, p.ROW, p.ROW_SPLIT))
        counts = sharded, linears - len(plan.names(p.VOCAB_HEAD))
        record = Sharding(plan, mesh, config, layouts_of(bare), shapes, counts, tuple(equalised))
        setattr(bare, ATTRIBUTE, record)
    return record


def layouts_by_name(model: nn.Module, plan: Plan) -> dict[str, ShardLayout]:
    """How each parameter that ``plan`` cuts lies, by every name it has."""
    found = {id(param): layout for param, layout in _layouts(plan, _finder(model, ()))}
    tensors = model.named_parameters(remove_duplicate=False)
    return {name: found[id(param)] for name, param in tensors if id(param) in found}


def layouts_of(model: nn.Module) -> dict[str, ShardLayout]:
    """How the sharded parameters of ``model`` lie, under every name they have."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: param.tp_layout for name, param in named if hasattr(param, "tp_layout")}


Finder = Callable[[str], list[nn.Module]]


def _finder(bare: nn.Module, twins: adapters.Twins) -> Finder:
    """Name -> the module of that name, and its twins."""

    def find(name: str) -> list[nn.Module]:
        return [bare.get_submodule(name), *(twin for of, twin in twins if of == name)]

    return find


def _layouts(plan: Plan, find: Finder) -> list[tuple[nn.Parameter, ShardLayout]]:
    """Every parameter that is cut, once, and how; of a tied one, the first that speaks of it counts."""
    found: dict[int, tuple[nn.Parameter, ShardLayout]] = {}
    for name, placement in plan.placements.items():
        for module in find(name):
            for leaf, layout in placement.layouts.items():
                param = getattr(module, leaf)
                found.setdefault(id(param), (param, layout))
    return list(found.values())


def _swap(model: nn.Module, plan: Plan, find: Finder, mesh: ParallelMesh, config: TensorParallelConfig) -> None:
    partial = {name for mixture in plan.mixtures if mixture.summed for name in (mixture.experts, *mixture.rows)}
    for name, placement in plan.placements.items():
        for module in find(name):
            if placement.style in (p.ENTER, p.LATENT):
                enter_after(module, mesh, placement.tail)
            if placement.style == p.FIRST:
                count_once(module, mesh)
            if placement.style not in _CLASS_OF_STYLE:
                continue
            module.__class__ = _class_for(module, placement)
            _set_up(module, placement, mesh, config, partial=name in partial)
    for region in plan.regions:
        block = model.get_submodule(region.block)
        door = Region(mesh, block)
        for name in region.columns:
            for column in find(name):
                door.admit(column)
        for row in find(region.row):
            door.release(row)
        for one in region.locals:
            set_local(model.get_submodule(one.module), one.attribute, one.values[mesh.tp_rank])
        for given in region.inputs:
            slice_heads(model.get_submodule(given.module), given.argument, given.heads, given.held[mesh.tp_rank])
    for mixture in plan.mixtures:
        block = model.get_submodule(mixture.block)
        door = Region(mesh, block, derive_randomness=False)
        door.admit_experts(model.get_submodule(mixture.experts))
        for name in mixture.shared:
            for shared in find(name):
                door.admit(shared)
        if mixture.summed:
            sum_at_exit(block, mesh)
    blocks: dict[str, Region] = {}
    for name in plan.names(p.COLUMN_GATHER):
        parent = name.rpartition(".")[0]
        if parent not in blocks:  # the output is joined at once: nothing in the block is sharded, nor its dropout
            blocks[parent] = Region(mesh, model.get_submodule(parent), derive_randomness=False)
        for column in find(name):
            blocks[parent].admit(column)


def _set_up(
    module: nn.Module, placement: Placement, mesh: ParallelMesh, config: TensorParallelConfig, *, partial: bool
) -> None:
    if isinstance(module, ParallelExperts):
        once = [leaf for leaf, _ in module.named_parameters() if leaf not in placement.layouts]
        module.tp_setup(mesh, dict(placement.layouts), once=once, partial=partial)
        return
    outputs = placement.outputs[mesh.tp_rank] if placement.outputs else None
    if isinstance(module, EachHead):
        module.tp_setup(outputs or ())
        return
    layout = placement.layouts["weight"]
    if isinstance(module, ColumnParallel):
        module.tp_setup(mesh, layout, gather=placement.style == p.COLUMN_GATHER, outputs=outputs)
    elif isinstance(module, RowParallel):
        module.tp_setup(mesh, layout, split=placement.style == p.ROW_SPLIT, partial=partial)
    elif isinstance(module, VocabParallelHead):
        module.tp_setup(mesh, layout, config.loss_workspace_mib << 20 or None)
    elif isinstance(module, VocabParallelEmbedding):
        module.tp_setup(mesh, layout)
    elif isinstance(module, WideRMSNorm):
        module.tp_setup(mesh, layout, outputs=outputs)


def _class_for(module: nn.Module, placement: Placement) -> type:
    """The sharded class itself, or, for a subclass with a forward of its own, that subclass with ours behind it.

    Experts keep the forward of their class and have ours before it.
    """
    original, sharded = type(module), _CLASS_OF_STYLE[placement.style]
    if is_conv1d(module):
        from tp_plugin.layers.conv1d import ColumnParallelConv1D, RowParallelConv1D

        return ColumnParallelConv1D if issubclass(sharded, ColumnParallel) else RowParallelConv1D
    if original in (nn.Linear, nn.Embedding) or placement.equivalent or sharded in (WideRMSNorm, EachHead):
        return sharded
    key = original, sharded
    if key not in _MADE:
        bases = (sharded, original) if sharded is ParallelExperts else (original, sharded)
        _MADE[key] = type(f"{sharded.__name__}Of{original.__name__}", bases, {})
    return _MADE[key]


def _sum_partial(plan: Plan, find: Finder, mesh: ParallelMesh) -> None:
    for name in plan.names(p.PARTIAL):
        for module in find(name):
            for param in module.parameters(recurse=False):
                sum_partial_gradient(param, mesh)
