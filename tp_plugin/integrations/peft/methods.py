"""Adapter methods: one class for each kind of PEFT layer that is sharded, by the module that the layer adapts.

A delta has the rows or columns of its base. On a column ``A`` is replicated and reads the region's input, so its
gradient is partial, and ``B`` is sharded like the base. On a row ``A`` is sharded like the base and its small output is
summed, and ``B`` is replicated. PEFT's own forward combines them.
"""

from __future__ import annotations

from typing import Any

from peft.tuners import ia3, lora
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from tp_plugin.integrations.peft.adapter_method import METHODS, REPLICATED, AdapterMethod, Site, Target
from tp_plugin.integrations.peft.layers import ShardedDora, VocabParallelLoraEmbedding
from tp_plugin.integrations.peft.wrappers import tuners_of, wrapped
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
)
from tp_plugin.layers.instance_forwards import become
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh
from tp_plugin.param_info import info_of, update_info
from tp_plugin.plans import plan as p


class LoraLinear(AdapterMethod):
    """LoRA and DoRA on linear layers."""

    styles = (*REPLICATED, p.COLUMN, p.COLUMN_GATHER, p.ROW, p.ROW_SPLIT, p.VOCAB_HEAD, p.ENTER, p.LATENT)

    def parameters(self, tuner: Any) -> dict[str, nn.Parameter]:
        return {adapter: linear.weight for adapter, linear in tuner.lora_A.items()}

    def unsupported(self, target: Target, adapter: str) -> str | None:
        name, style = target.name, target.style
        if adapter in target.tuner.lora_magnitude_vector:
            styles = (p.COLUMN_GATHER, p.VOCAB_HEAD, p.ENTER, p.LATENT)
            if target.summed or target.repeats_heads or style in styles:
                what = "key/value heads that a rank uses more than once" if target.repeats_heads else f"style {style}"
                return (
                    f"DoRA on {name!r} ({what}) is not supported; train LoRA there, or leave it out of target_modules."
                )
        if target.tuner.lora_bias[adapter]:
            if target.summed:
                return f"lora_bias on {name!r} would be added to a partial result; set lora_bias=False."
            if style == p.VOCAB_HEAD:
                return f"lora_bias on the head {name!r} is not supported; set lora_bias=False."
        return None

    def shard(self, site: Site) -> None:
        tuner, base, mesh = site.tuner, site.base, site.mesh
        first, second = tuner.lora_A[site.adapter], tuner.lora_B[site.adapter]
        dropout = tuner.lora_dropout[site.adapter]
        if isinstance(base, RowParallel) and not base.tp_split:
            draw_by_rank(dropout, mesh.tp_rank)
        else:
            draw_in_common(dropout)
        if isinstance(base, ColumnParallel):
            site.sum_gradient(first.weight)
            layout = site.shard_linear(second, 0)
            ColumnParallelLinear.convert(second, layout, mesh, gather=base.tp_gather, outputs=base.tp_outputs)
            self._shard_magnitudes(site, layout)
        elif isinstance(base, RowParallel):
            layout = site.shard_linear(first, 1)
            # where the base's result stays partial for the block to sum, so does the delta, and B's gradient with it
            RowParallelLinear.convert(first, layout, mesh, split=base.tp_split, partial=base.tp_partial)
            if base.tp_partial:
                site.sum_gradient(second.weight)
            self._shard_magnitudes(site, None)
        elif isinstance(base, VocabParallelHead):  # the sum of its logits and the base's is deferred too
            layout = site.shard_linear(second, 0)
            VocabParallelHead.convert(second, layout, mesh, workspace_bytes=base.tp_workspace_bytes)
        elif hasattr(base, "tp_entry"):
            boundary, tail = base.tp_entry
            boundary.enter_after(second, tail)

    def _shard_magnitudes(self, site: Site, outputs: ShardLayout | None) -> None:
        """Shard DoRA's magnitudes, if there are any, by ``outputs``; None where every rank has all outputs."""
        if site.adapter not in site.tuner.lora_magnitude_vector:
            return
        magnitudes: Any = site.tuner.lora_magnitude_vector[site.adapter]
        become(magnitudes, ShardedDora)
        magnitudes.tp_mesh, magnitudes.tp_row = site.mesh, outputs is None
        if outputs is not None:
            site.shard(magnitudes.weight, 0, outputs)


class LoraEmbedding(AdapterMethod):
    """LoRA on embeddings."""

    styles = (*REPLICATED, p.VOCAB_EMBEDDING)

    def parameters(self, tuner: Any) -> dict[str, nn.Parameter]:
        return dict(tuner.lora_embedding_A.items())

    def shard(self, site: Site) -> None:
        if isinstance(site.base, VocabParallelEmbedding):
            site.shard(site.tuner.lora_embedding_A[site.adapter], 1)
            become(site.tuner, VocabParallelLoraEmbedding)


class LoraExperts(AdapterMethod):
    """LoRA on parameters of experts (``target_parameters``).

    An expert's delta is added to its shard, inside the region, so the gradient of the replicated factor is partial.
    """

    styles = (*REPLICATED, p.EXPERTS)

    def parameters(self, tuner: Any) -> dict[str, nn.Parameter]:
        return {adapter: linear.weight for adapter, linear in tuner.lora_A.items()}

    def unsupported(self, target: Target, adapter: str) -> str | None:
        sharded = {} if target.placement is None else target.placement.layouts
        if target.style == p.EXPERTS and target.tuner.parameter_name not in sharded:
            return (
                f"target_parameters names {target.tuner.parameter_name!r} of {target.name!r}, which is replicated and "
                "which every rank would add to a partial result; leave it out of target_parameters."
            )
        return None

    def shard(self, site: Site) -> None:
        tuner, base = site.tuner, site.base
        layout = base.tp_layouts.get(tuner.parameter_name) if isinstance(base, ParallelExperts) else None
        if layout is None:
            return
        first, second = tuner.lora_A[site.adapter], tuner.lora_B[site.adapter]
        outputs = 1 if tuner._did_swap_in_out_features else 2  # [experts, out, in], or [experts, in, out]
        if layout.dim == outputs:
            site.shard_linear(second, 0, layout)
            site.sum_gradient(first.weight)
        else:
            site.shard_linear(first, 1, layout)
            site.sum_gradient(second.weight)


class Ia3Linear(AdapterMethod):
    """IA3: a factor for each input (``is_feedforward``) or for each output of a linear layer."""

    styles = (*REPLICATED, p.COLUMN, p.COLUMN_GATHER, p.ROW, p.ROW_SPLIT)

    def parameters(self, tuner: Any) -> dict[str, nn.Parameter]:
        return dict(tuner.ia3_l.items())

    def unsupported(self, target: Target, adapter: str) -> str | None:
        if target.style == p.COLUMN and target.repeats_heads and not target.tuner.is_feedforward:
            return (
                f"IA3 on {target.name!r} scales key/value heads that ranks share; choose an autotp_size that divides "
                "them."
            )
        return None

    def shard(self, site: Site) -> None:
        tuner, base = site.tuner, site.base
        factors: Any = tuner.ia3_l[site.adapter]
        if isinstance(base, ColumnParallel):
            if tuner.is_feedforward:
                site.sum_gradient(factors)
            elif not base.tp_gather:
                site.shard(factors, 0)
        elif isinstance(base, RowParallel) and tuner.is_feedforward and not base.tp_split:
            site.shard(factors, 1)
        elif isinstance(base, RowParallel) and base.tp_partial and not tuner.is_feedforward:
            site.sum_gradient(factors)  # it scales a partial result


OURS: dict[type, AdapterMethod] = {
    lora.Linear: LoraLinear(),
    lora.Embedding: LoraEmbedding(),
    VocabParallelLoraEmbedding: LoraEmbedding(),
    ParamWrapper: LoraExperts(),
    ia3.Linear: Ia3Linear(),
}
METHODS.update(OURS | METHODS)  # a user's method goes first


def shard_adapters(bare: nn.Module, mesh: ParallelMesh) -> None:
    """Shard every adapter in ``bare`` whose module is sharded and that is not sharded yet."""
    for _, tuner in tuners_of(bare):
        base: Any = wrapped(tuner)
        method = METHODS[type(tuner)]
        for adapter, first in method.parameters(tuner).items():
            if not info_of(first).adapter_sharded:
                update_info(first, adapter_sharded=True)
                method.shard(Site(tuner, adapter, base, mesh))
                if isinstance(base, VocabParallelHead) and (heads := getattr(bare, "tp_heads", None)) is not None:
                    heads.append(tuner.lora_B[adapter])  # logits are gathered at the model's exit, not here
        # columns of a shared expert have no region entry of their own: their block has one
        if isinstance(base, ColumnParallel) and hasattr(base, "tp_region") and not hasattr(tuner, "tp_admitted"):
            tuner.tp_admitted = True
            base.tp_region.attach_input_around(tuner, base)  # type: ignore[union-attr,operator]
