"""Vocabulary-parallel language-model head: logits that have not been computed yet."""

from __future__ import annotations

import torch
from torch import nn

from tp_plugin.layers.linear import shard_repr
from tp_plugin.layout import ShardLayout
from tp_plugin.lazy import lazy_logits
from tp_plugin.loss import VocabShard
from tp_plugin.mesh import ParallelMesh


class VocabParallelHead(nn.Linear):
    """Holds the rows of its part of the vocabulary: hidden ``[..., hidden]``, logits ``[..., vocabulary]``.

    The logits have their full logical shape but are not computed: see :class:`~tp_plugin.lazy.VocabParallelLogits`.
    The head is its own door, the gradient of its input comes out summed over the group.
    """

    tp_mesh: ParallelMesh
    tp_layout: ShardLayout
    tp_vocab: VocabShard
    tp_workspace_bytes: int | None
    tp_inside_model: bool  # the model's forward is under way, and makes logits whole at its exit

    def tp_setup(self, mesh: ParallelMesh, layout: ShardLayout, workspace_bytes: int | None) -> None:
        """Fields for a module whose class has just become this one and whose parameters are shards already."""
        self.tp_mesh, self.tp_layout, self.tp_workspace_bytes = mesh, layout, workspace_bytes
        self.tp_vocab = VocabShard.balanced(layout.shape[0], mesh.tp_group)
        self.tp_inside_model = False
        self.weight.tp_vocab = self.tp_vocab  # type: ignore[attr-defined]  # for who multiplies by the weight itself
        self.out_features = layout.local_size(mesh.tp_rank)

    @torch.compiler.disable
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = lazy_logits(hidden, self.weight, self.bias, self.tp_vocab, workspace_bytes=self.tp_workspace_bytes)
        if torch.is_grad_enabled() or self.tp_inside_model:
            return logits
        return logits.materialize()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {shard_repr(self.tp_mesh, self.tp_layout)}"
