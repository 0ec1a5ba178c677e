"""Vocabulary-parallel token embedding (Megatron-LM, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tp_plugin.collectives import reduce_from_region
from tp_plugin.errors import NO_FULLGRAPH
from tp_plugin.layers.linear import shard_repr
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh


class VocabParallelEmbedding(nn.Embedding):
    """Holds the rows of its part of the vocabulary: ids ``[...]`` (any integers), output ``[..., hidden]``, replicated.

    Each rank looks up the ids it has and gives zeros for the others; the sum over the group is the embedding. Put in
    place by changing a module's class. A subclass of ``nn.Embedding`` that calls ``super().forward`` (Gemma's scaled
    embedding) keeps its own forward: this class is put *behind* it in the method resolution order.

    Raises:
        IndexError: an id outside the vocabulary, which no rank would have. On CUDA a device-side assertion, so that
            no host synchronisation is needed.
    """

    tp_mesh: ParallelMesh
    tp_layout: ShardLayout

    def tp_setup(self, mesh: ParallelMesh, layout: ShardLayout) -> None:
        """Fields for a module whose class has just become this one and whose weight is a shard already."""
        self.tp_mesh, self.tp_layout = mesh, layout
        self.num_embeddings = layout.local_size(mesh.tp_rank)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.tp_lookup(input, self.weight)

    def tp_lookup(self, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Rows of a table ``[rows of this rank, n]`` that is cut like this one: ids ``[...]``, output ``[..., n]``."""
        start, stop = self.tp_layout.parts[self.tp_mesh.tp_rank][0]
        vocabulary = self.tp_layout.shape[0]
        _check_ids(input, vocabulary)
        elsewhere = (input < start) | (input >= stop)
        local = (input - start).masked_fill(elsewhere, 0)
        padding = None if self.padding_idx is None or not start <= self.padding_idx < stop else self.padding_idx - start
        out = F.embedding(local, weight, padding)
        return reduce_from_region(out.masked_fill(elsewhere.unsqueeze(-1), 0), self.tp_mesh.tp_group)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {shard_repr(self.tp_mesh, self.tp_layout)}"


@torch.compiler.disable(reason=NO_FULLGRAPH)
def _check_ids(ids: torch.Tensor, vocabulary: int) -> None:
    inside = ((ids >= 0) & (ids < vocabulary)).all()
    message = f"a token id lies outside the vocabulary of {vocabulary}"
    if ids.device.type != "cpu":
        torch._assert_async(inside, message)
    elif not inside:
        raise IndexError(f"{message}: ids go from {int(ids.min())} to {int(ids.max())}")
