"""Vocabulary-parallel token embedding and language-model head (Megatron-LM, section 3).

Both shard the table ``[vocabulary, hidden]`` by rows. The embedding's partial lookups are summed as they leave; the
head's logits are not computed until they are needed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tp_plugin.errors import NO_FULLGRAPH
from tp_plugin.layers.parallel_layer import ParallelLayer
from tp_plugin.lazy import lazy_logits
from tp_plugin.loss import VocabShard
from tp_plugin.param_info import update_info


class VocabParallelEmbedding(ParallelLayer, nn.Embedding):
    """Has the rows of this rank's part of the vocabulary: ids ``[...]`` (any integers), output ``[..., hidden]``.

    Each rank looks up its own ids and takes zeros for the others; the sum over the group, replicated, is the output.
    A subclass of ``nn.Embedding`` that calls ``super().forward`` (Gemma's scaled embedding) keeps its own forward.

    Raises:
        IndexError: an id outside of the vocabulary. On CUDA a device-side assertion, without host synchronisation.
    """

    tp_replaces = nn.Embedding

    def tp_setup(self) -> None:
        self.num_embeddings = self.tp_layout.shape[0]  # ids of the full vocabulary are accepted

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.tp_lookup(input, self.weight)

    def tp_lookup(self, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Rows of a table ``[rows of this rank, n]`` sharded like this one: ids ``[...]``, output ``[..., n]``."""
        start, stop = self.tp_layout.parts[self.tp_mesh.tp_rank][0]
        vocabulary = self.tp_layout.shape[0]
        _check_ids(input, vocabulary)
        elsewhere = (input < start) | (input >= stop)
        local = (input - start).masked_fill(elsewhere, 0)
        padding = None if self.padding_idx is None or not start <= self.padding_idx < stop else self.padding_idx - start
        out = F.embedding(local, weight, padding)
        return self.tp_boundary.leave(out.masked_fill(elsewhere.unsqueeze(-1), 0))


class VocabParallelHead(ParallelLayer, nn.Linear):
    """Has the rows of this rank's part of the vocabulary: hidden ``[..., hidden]``, logits ``[..., vocabulary]``.

    The logits have their full logical shape but are not computed: see :class:`~tp_plugin.lazy.VocabParallelLogits`.
    The loss sums the gradient of the head's input over the group.
    """

    tp_replaces = nn.Linear
    tp_vocab: VocabShard
    tp_workspace_bytes: int | None
    tp_inside_model: bool  # during the model's forward, which computes full logits at its exit

    def tp_setup(self, *, workspace_bytes: int | None = None) -> None:
        self.tp_workspace_bytes = workspace_bytes
        self.tp_vocab = VocabShard.balanced(self.tp_layout.shape[0], self.tp_mesh.tp_group)
        self.tp_inside_model = False
        update_info(self.weight, vocab=self.tp_vocab)  # read where a library multiplies by the weight itself
        self.out_features = self.tp_layout.shape[0]  # losses read the logits' size here

    @torch.compiler.disable
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.tp_boundary.enter_summed(hidden)
        logits = lazy_logits(hidden, self.weight, self.bias, self.tp_vocab, workspace_bytes=self.tp_workspace_bytes)
        if torch.is_grad_enabled() or self.tp_inside_model:
            return logits
        return logits.materialize()


@torch.compiler.disable(reason=NO_FULLGRAPH)
def _check_ids(ids: torch.Tensor, vocabulary: int) -> None:
    inside = ((ids >= 0) & (ids < vocabulary)).all()
    message = f"a token id is outside of the vocabulary of {vocabulary}"
    if ids.device.type != "cpu":
        torch._assert_async(inside, message)
    elif not inside:
        raise IndexError(f"{message}: ids go from {int(ids.min())} to {int(ids.max())}")
