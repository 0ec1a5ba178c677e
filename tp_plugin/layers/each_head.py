"""A list of modules, one for each head (StableLM's norms of queries and keys), on this rank's heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class EachHead(nn.Module):
    """Applies module ``norms[h]`` to head ``h`` of ``[batch, heads, tokens, head_dim]``, this rank's heads.

    Every rank keeps every module, so that names stay, and runs those of other ranks' heads on no rows at all: their
    gradients are then zeros, not missing, and can be summed over the group. Put in place by changing a module's class.
    """

    norms: nn.ModuleList
    tp_heads: tuple[int, ...]

    def tp_setup(self, heads: Sequence[int]) -> None:
        """``heads``: which head each of the input's is, some perhaps more than once."""
        self.tp_heads = tuple(heads)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows: dict[int, torch.Tensor] = {}
        nothing = []
        for head, norm in enumerate(self.norms):
            own = [row for row, which in enumerate(self.tp_heads) if which == head]
            if not own:
                nothing.append(norm(hidden_states[:, :0]))
            rows |= {row: norm(hidden_states[:, row : row + 1]) for row in own}
        return torch.cat([*(rows[row] for row in range(len(self.tp_heads))), *nothing], 1)
