"""Adapters laid out by the modules they adapt.

A delta has the rows or columns of its base. On a column ``A`` is replicated and reads what has entered the region, so
its gradient is partial, and ``B`` is cut like the base. On a row ``A`` is cut like the base and its small output is
summed, and ``B`` is replicated. PEFT's own forward puts them together, whatever it does besides.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import ia3, lora
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.peft.dora import ShardedDora
from tp_plugin.integrations.peft.wrappers import tuners_of, twins_of, wrapped, wrappers_of
from tp_plugin.layers import (
    ColumnParallel,
    ColumnParallelLinear,
    ParallelExperts,
    RowParallel,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    draw_by_rank,
    draw_in_common,
    enter_after,
    sum_partial_gradient,
)
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh
from tp_plugin.sharding.adapters import cut, note

EMPTY = (
    "low_cpu_mem_usage=True (or assign=True) puts new parameters into the places of those that a sharded model has and "
    "that know how they lie; leave it off."
)


class VocabParallelLoraEmbedding(lora.Embedding):
    """LoRA on an embedding whose vocabulary is sharded: ``A`` ``[r, words of this rank]``, ``B`` replicated."""

    def _embed(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base: Any = self.get_base_layer()
        return base.tp_lookup(input, weight)


def lay(bare: nn.Module, mesh: ParallelMesh) -> None:
    """Shard every adapter in ``bare`` whose module is sharded and that was not laid before."""
    for _, tuner in tuners_of(bare):
        base: Any = wrapped(tuner)
        for adapter in adapters_in(tuner):
            if not getattr(marked(tuner, adapter), "tp_laid", False):
                marked(tuner, adapter).tp_laid = True
                _lay(tuner, adapter, base, mesh)
                if isinstance(base, VocabParallelHead) and (heads := getattr(bare, "tp_heads", None)) is not None:
                    heads.append(tuner.lora_B[adapter])  # logits are made whole at the model's exit, not here
        # columns of a shared expert have no door of their own: their block has one
        if isinstance(base, ColumnParallel) and hasattr(base, "tp_region") and not hasattr(tuner, "tp_admitted"):
            tuner.tp_admitted = True
            base.tp_region.admit_around(tuner, base)  # type: ignore[union-attr,operator]
    for module in [*(wrapped(one) for *_, one in wrappers_of(bare)), *(twin for _, twin in twins_of(bare))]:
        for part in module.modules():
            take_full_tensors(part, mesh)


def adapters_in(tuner: Any) -> list[str]:
    """Names of the adapters in a layer."""
    if isinstance(tuner, ia3.IA3Layer):
        return list(tuner.ia3_l)
    return [*tuner.lora_A, *tuner.lora_embedding_A]


def marked(tuner: Any, adapter: str) -> Any:
    """The first parameter of one adapter in a layer, which carries the mark that it has been laid."""
    if isinstance(tuner, ia3.IA3Layer):
        return tuner.ia3_l[adapter]
    return tuner.lora_A[adapter].weight if adapter in tuner.lora_A else tuner.lora_embedding_A[adapter]


def _lay(tuner: Any, adapter: str, base: Any, mesh: ParallelMesh) -> None:
    if isinstance(tuner, ia3.IA3Layer):
        _lay_ia3(tuner, adapter, base, mesh)
    elif isinstance(tuner, ParamWrapper):
        _lay_experts(tuner, adapter, base, mesh)
    elif isinstance(tuner, lora.Embedding):
        _lay_embedding(tuner, adapter, base, mesh)
    else:
        _lay_linear(tuner, adapter, base, mesh)


def _lay_linear(tuner: Any, adapter: str, base: Any, mesh: ParallelMesh) -> None:
    first, second = tuner.lora_A[adapter], tuner.lora_B[adapter]
    dropout = tuner.lora_dropout[adapter]
    if isinstance(base, RowParallel) and not base.tp_split:
        draw_by_rank(dropout, mesh.tp_rank)
    else:
        draw_in_common(dropout)
    if isinstance(base, ColumnParallel):
        sum_partial_gradient(first.weight, mesh)
        layout = base.tp_layout.along(0, second.weight.shape)
        _cut_all(second, layout, mesh)
        second.__class__ = ColumnParallelLinear
        second.tp_setup(mesh, layout, gather=base.tp_gather, outputs=base.tp_outputs)
        _lay_magnitudes(tuner, adapter, mesh, layout)
    elif isinstance(base, RowParallel):
        layout = base.tp_layout.along(1, first.weight.shape)
        _cut_all(first, layout, mesh)
        first.__class__ = RowParallelLinear
        # where the base's result stays partial for the block to sum, so does the delta, and B's gradient with it
        first.tp_setup(mesh, layout, split=base.tp_split, partial=base.tp_partial)
        if base.tp_partial:
            sum_partial_gradient(second.weight, mesh)
        _lay_magnitudes(tuner, adapter, mesh, None)
    elif isinstance(base, VocabParallelHead):  # the sum of its logits and the base's is not computed either
        layout = base.tp_layout.along(0, second.weight.shape)
        _cut_all(second, layout, mesh)
        second.__class__ = VocabParallelHead
        second.tp_setup(mesh, layout, base.tp_workspace_bytes)
    elif hasattr(base, "tp_enters"):
        enter_after(second, *base.tp_enters)


def _lay_magnitudes(tuner: Any, adapter: str, mesh: ParallelMesh, outputs: ShardLayout | None) -> None:
    """Those of DoRA, where it is one; ``outputs``: how the base's lie, None where every rank has all."""
    if adapter not in tuner.lora_magnitude_vector:
        return
    magnitudes: Any = tuner.lora_magnitude_vector[adapter]
    magnitudes.__class__ = ShardedDora
    magnitudes.tp_mesh, magnitudes.tp_row = mesh, outputs is None
    if outputs is not None:
        place(magnitudes.weight, outputs.along(0, magnitudes.weight.shape), mesh)
        take_full_tensors(magnitudes, mesh)


def _lay_embedding(tuner: Any, adapter: str, base: Any, mesh: ParallelMesh) -> None:
    if isinstance(base, VocabParallelEmbedding):
        table = tuner.lora_embedding_A
        place(table[adapter], base.tp_layout.along(1, table[adapter].shape), mesh)
        tuner.__class__ = VocabParallelLoraEmbedding
        take_full_tensors(table, mesh)


def _lay_experts(tuner: Any, adapter: str, base: Any, mesh: ParallelMesh) -> None:
    """An expert's delta is added to its shard, inside the region: there the factor that is not cut acts too."""
    layout = base.tp_layouts.get(tuner.parameter_name) if isinstance(base, ParallelExperts) else None
    if layout is None:
        return
    first, second = tuner.lora_A[adapter], tuner.lora_B[adapter]
    outputs = 1 if tuner._did_swap_in_out_features else 2  # [experts, out, in], or [experts, in, out]
    if layout.dim == outputs:
        _cut_all(second, layout.along(0, second.weight.shape), mesh)
        sum_partial_gradient(first.weight, mesh)
    else:
        _cut_all(first, layout.along(1, first.weight.shape), mesh)
        sum_partial_gradient(second.weight, mesh)


def _lay_ia3(tuner: Any, adapter: str, base: Any, mesh: ParallelMesh) -> None:
    """A factor for each input (``is_feedforward``) or for each output of its base."""
    factors: Any = tuner.ia3_l[adapter]
    if isinstance(base, ColumnParallel):
        if tuner.is_feedforward:
            sum_partial_gradient(factors, mesh)
        elif not base.tp_gather:
            place(factors, base.tp_layout.along(0, factors.shape), mesh)
    elif isinstance(base, RowParallel) and tuner.is_feedforward and not base.tp_split:
        place(factors, base.tp_layout.along(1, factors.shape), mesh)
    elif isinstance(base, RowParallel) and base.tp_partial and not tuner.is_feedforward:
        sum_partial_gradient(factors, mesh)  # it scales a partial result
    take_full_tensors(tuner.ia3_l, mesh)


def _cut_all(linear: nn.Linear, layout: ShardLayout, mesh: ParallelMesh) -> None:
    """Cut the weight, and, where its outputs are cut, the bias."""
    for param in linear.parameters(recurse=False):
        if param.dim() == 2:
            place(param, layout, mesh)
        elif layout.dim == 0:
            place(param, layout.along(0, param.shape), mesh)
    take_full_tensors(linear, mesh)


def place(param: nn.Parameter, layout: ShardLayout, mesh: ParallelMesh) -> None:
    """Keep this rank's shard of a whole parameter, and remember how it lies."""
    cut(param, layout, mesh)
    note(param, layout, mesh)


def take_full_tensors(module: nn.Module, mesh: ParallelMesh) -> None:
    """Let ``load_state_dict`` give ``module`` full tensors, of which it takes its shards."""
    if getattr(module, "tp_takes_full", False):
        return
    module.tp_takes_full = True  # type: ignore[assignment]

    def shard(module: nn.Module, state: dict, prefix: str, metadata: dict, *_: object) -> None:
        if metadata.get("assign_to_params_buffers"):
            raise TensorParallelError(EMPTY)
        for name, param in module.named_parameters(recurse=False):
            layout: ShardLayout | None = getattr(param, "tp_layout", None)
            given = state.get(f"{prefix}{name}")
            if layout is not None and given is not None and tuple(given.shape) == layout.shape:
                state[f"{prefix}{name}"] = layout.shard(given, mesh.tp_rank)

    module.register_load_state_dict_pre_hook(shard)
