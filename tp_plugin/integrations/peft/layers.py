"""PEFT's layers whose own forward would be wrong on shards. They are installed by changing a module's class."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils.other import transpose

from tp_plugin.collectives import all_reduce_
from tp_plugin.errors import TensorParallelError
from tp_plugin.mesh import ParallelMesh
from tp_plugin.partitioned import is_partitioned


class VocabParallelLoraEmbedding(lora.Embedding):
    """LoRA on an embedding whose vocabulary is sharded: ``A`` ``[r, words of this rank]``, ``B`` replicated."""

    def _embed(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base: Any = self.get_base_layer()
        return base.tp_lookup(input, weight)


class ShardedDora(DoraLinearLayer):
    """DoRA on a sharded linear layer: ``m * (W + s B A) / ||W + s B A||``, a norm for each output (Liu et al. 2024).

    On a column a rank has all inputs of its outputs, and their magnitudes. On a row it has all magnitudes and some
    inputs of each output, whose squares are summed over the group.
    """

    tp_mesh: ParallelMesh
    tp_row: bool

    def get_lora_weight(self, lora_A: Any, lora_B: Any, adapter_name: str | None = None) -> torch.Tensor:
        return lora_B.weight @ lora_A.weight

    @torch.no_grad()
    def get_weight_norm(
        self, weight: torch.Tensor, lora_weight: torch.Tensor, scaling: float, adapter_name: str | None = None
    ) -> torch.Tensor:
        """Norms ``[out]`` of the adapted weight, of which this rank has a shard; on a row a collective call."""
        squares = (transpose(weight, self.fan_in_fan_out) + scaling * lora_weight).float().square().sum(1)
        if self.tp_row:
            all_reduce_(squares, self.tp_mesh.tp_group, purpose="norm")
        return squares.sqrt().to(weight.dtype)

    def forward(
        self,
        x: torch.Tensor,
        *,
        lora_A: Any,
        lora_B: Any,
        scaling: float,
        base_layer: Any,
        base_result: torch.Tensor | None = None,
        adapter_name: str = "default",
    ) -> torch.Tensor:
        """Return the summand for the base's result, which is given unless ``x`` went through a dropout."""
        if is_partitioned(base_layer.weight):
            raise TensorParallelError(
                "DoRA takes norms of full weights in every forward, and ZeRO-3 has partitioned them; use ZeRO 2 or "
                "less, or LoRA without use_dora."
            )
        norms = self.get_weight_norm(base_layer.weight, self.get_lora_weight(lora_A, lora_B), scaling)
        scale = self.weight / norms.to(x.dtype)
        base = base_layer(x) if base_result is None else base_result
        if base_layer.bias is not None:
            base = base - base_layer.bias
        return (scale - 1) * base + scale * lora_B(lora_A(x)) * scaling
