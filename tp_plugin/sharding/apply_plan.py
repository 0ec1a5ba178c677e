"""A plan applied to a model in place: classes change, ``nn.Parameter`` objects and their names stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from tp_plugin.config import TensorParallelConfig
from tp_plugin.layers import (
    Boundary,
    ColumnParallelLinear,
    ParallelExperts,
    PerHeadNorm,
    Region,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    WideRMSNorm,
    set_local,
    slice_heads,
    sum_partial_gradient,
)
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh
from tp_plugin.plans import Placement, Plan
from tp_plugin.plans import plan as p
from tp_plugin.sharding.adapters import TrainedCopies

Finder = Callable[[str], list[nn.Module]]
"""Name of a module -> the module and its trained copies."""


def finder(bare: nn.Module, copies: TrainedCopies) -> Finder:
    """Look modules up in ``bare`` and in the copies that adapters train in their place."""

    def find(name: str) -> list[nn.Module]:
        return [bare.get_submodule(name), *(module for of, module in copies if of == name)]

    return find


def placed_parameters(plan: Plan, find: Finder) -> list[tuple[nn.Parameter, ShardLayout]]:
    """Every parameter that has a layout, once; the first placement of a tied one counts."""
    found: dict[int, tuple[nn.Parameter, ShardLayout]] = {}
    for name, placement in plan.placements.items():
        for module in find(name):
            for leaf, layout in placement.layouts.items():
                param = getattr(module, leaf)
                found.setdefault(id(param), (param, layout))
    return list(found.values())


def apply_plan(model: nn.Module, plan: Plan, find: Finder, mesh: ParallelMesh, config: TensorParallelConfig) -> None:
    """Convert the modules of ``model``, whose parameters are this rank's shards already."""
    partial = {name for mixture in plan.mixtures if mixture.summed for name in (mixture.experts, *mixture.rows)}
    for name, placement in plan.placements.items():
        for module in find(name):
            _convert_layer(module, placement, mesh, config, partial=name in partial)
    _form_regions(model, plan, find, mesh)
    _form_mixtures(model, plan, find, mesh)
    _form_gathered_columns(model, plan, find, mesh)
    for name in plan.names(p.PARTIAL):
        for module in find(name):
            for param in module.parameters(recurse=False):
                sum_partial_gradient(param, mesh)


def _convert_layer(
    module: nn.Module, placement: Placement, mesh: ParallelMesh, config: TensorParallelConfig, *, partial: bool
) -> None:
    """One row a style. Other styles keep the class: their parameters or their gradients are what changes."""
    style, layouts, equivalent = placement.style, placement.layouts, placement.equivalent
    outputs = placement.outputs[mesh.tp_rank] if placement.outputs else None
    if style in (p.COLUMN, p.COLUMN_GATHER):
        gather = style == p.COLUMN_GATHER
        ColumnParallelLinear.convert(
            module, layouts["weight"], mesh, equivalent=equivalent, gather=gather, outputs=outputs
        )
    elif style in (p.ROW, p.ROW_SPLIT):
        split = style == p.ROW_SPLIT
        RowParallelLinear.convert(module, layouts["weight"], mesh, equivalent=equivalent, split=split, partial=partial)
    elif style == p.VOCAB_EMBEDDING:
        VocabParallelEmbedding.convert(module, layouts["weight"], mesh, equivalent=equivalent)
    elif style == p.VOCAB_HEAD:
        workspace = config.loss_workspace_mib << 20 or None
        VocabParallelHead.convert(module, layouts["weight"], mesh, equivalent=equivalent, workspace_bytes=workspace)
    elif style == p.EXPERTS:
        ParallelExperts.convert(module, layouts, mesh, partial=partial)
    elif style == p.WIDE_NORM:
        WideRMSNorm.convert(module, layouts["weight"], mesh, outputs=outputs)
    elif style == p.EACH_HEAD:
        PerHeadNorm.convert(module, outputs or ())
    elif style in (p.ENTER, p.LATENT):
        Boundary(mesh).enter_after(module, placement.tail)
    elif style == p.FIRST:
        Boundary(mesh).rank0_only(module)


def _form_regions(model: nn.Module, plan: Plan, find: Finder, mesh: ParallelMesh) -> None:
    """Columns share one entry, the row leaves; forwards read sizes and arguments of this rank's heads."""
    for planned in plan.regions:
        region = Region(mesh, _with_forward(model, planned.block))
        _attach(region, planned.columns, find)
        for row in find(planned.row):
            region.attach_output(row)
        for one in planned.locals:
            set_local(model.get_submodule(one.module), one.attribute, one.values[mesh.tp_rank])
        for given in planned.inputs:
            slice_heads(model.get_submodule(given.module), given.argument, given.heads, given.held[mesh.tp_rank])


def _form_mixtures(model: nn.Module, plan: Plan, find: Finder, mesh: ParallelMesh) -> None:
    """Experts and shared experts enter together; the block leaves for all of them where its result is their sum."""
    for mixture in plan.mixtures:
        block = model.get_submodule(mixture.block)
        region = Region(mesh, block, derive_randomness=False)
        region.attach_experts(model.get_submodule(mixture.experts))
        _attach(region, mixture.shared, find)
        if mixture.summed:
            region.boundary.leave_after(block)


def _form_gathered_columns(model: nn.Module, plan: Plan, find: Finder, mesh: ParallelMesh) -> None:
    """Columns that gather their outputs at once: nothing else in their block is sharded, so its dropout is common."""
    regions: dict[str, Region] = {}
    for name in plan.names(p.COLUMN_GATHER):
        parent = name.rpartition(".")[0]
        if parent not in regions:
            regions[parent] = Region(mesh, model.get_submodule(parent), derive_randomness=False)
        _attach(regions[parent], [name], find)


def _attach(region: Region, names: Iterable[str], find: Finder) -> None:
    for name in names:
        for column in find(name):
            region.attach_input(column)


def _with_forward(model: nn.Module, name: str) -> nn.Module:
    """The module ``name``, or the nearest around it that has a forward: a list of modules is never left."""
    while name and isinstance(model.get_submodule(name), nn.ModuleList | nn.ModuleDict):
        name = name.rpartition(".")[0]
    return model.get_submodule(name)
