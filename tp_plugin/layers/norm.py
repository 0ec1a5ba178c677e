"""Norms inside an attention: over a sharded width (OLMo 2), and one module for each head (StableLM)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tp_plugin.collectives import copy_to_region, reduce_from_region
from tp_plugin.layers.instance_forwards import become
from tp_plugin.layers.parallel_layer import ParallelLayer, in_place, take_heads

PURPOSE = "norm"


class WideRMSNorm(ParallelLayer):
    """``weight * x / sqrt(mean(x^2) + eps)`` (Zhang and Sennrich 2019) for ``x`` [..., width], sharded.

    forward and backward: an all-reduce of the sum of squares, one number a row. A head that several ranks have, or
    that a rank uses more than once, is counted once. Computed in fp32; the result has the dtype of ``x``.
    """

    weight: nn.Parameter
    tp_outputs: tuple[int, ...] | None
    tp_epsilon: float
    tp_counted: list[tuple[int, int]]  # (start, size) along the input's width of what this rank counts

    def tp_setup(self, *, outputs: Sequence[int] | None = None) -> None:
        layout, mesh = self.tp_layout, self.tp_mesh
        self.tp_outputs = None if outputs is None or in_place(outputs) else tuple(outputs)
        self.tp_epsilon = float(next(vars(self)[name] for name in EPSILON if name in vars(self)))
        owned = [(local, stop - start) for start, stop, local in layout.owned(mesh.tp_rank)]
        if self.tp_outputs is None:
            self.tp_counted = owned
            return
        unit = layout.local_size(mesh.tp_rank) // (max(self.tp_outputs) + 1)
        mine = [head for head in range(max(self.tp_outputs) + 1) if _inside(head * unit, owned)]
        self.tp_counted = [(self.tp_outputs.index(head) * unit, unit) for head in mine]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.float()
        squares = [x.narrow(-1, start, size).square().sum(-1, keepdim=True) for start, size in self.tp_counted]
        total = torch.stack(squares).sum(0) if squares else x.narrow(-1, 0, 0).sum(-1, keepdim=True)
        group = self.tp_mesh.tp_group  # inside the region: partial before the sum, and its gradient too
        total = copy_to_region(reduce_from_region(total, group, purpose=PURPOSE), group, purpose=PURPOSE)
        x = x * torch.rsqrt(total / self.tp_layout.shape[0] + self.tp_epsilon)
        weight = self.weight if self.tp_outputs is None else take_heads(self.weight, self.tp_outputs)
        return (weight * x).to(hidden_states.dtype)


EPSILON = ("variance_epsilon", "eps")
"""Names of an RMS norm's epsilon."""


def _inside(index: int, pieces: list[tuple[int, int]]) -> bool:
    return any(start <= index < start + size for start, size in pieces)


class PerHeadNorm(nn.Module):
    """Applies module ``norms[h]`` to head ``h`` of ``[batch, heads, tokens, head_dim]``, this rank's heads.

    Every rank keeps every module, so that names stay. It runs those of other ranks' heads on empty input: their
    gradients are then zeros, not missing, and can be summed over the group.
    """

    norms: nn.ModuleList
    tp_heads: tuple[int, ...]

    @classmethod
    def convert(cls, module: nn.Module, heads: Sequence[int]) -> None:
        """Make ``module`` a norm of this class; ``heads``: the number of each of the input's heads, repeats allowed."""
        become(module, cls)
        module.tp_heads = tuple(heads)  # type: ignore[assignment]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows: dict[int, torch.Tensor] = {}
        nothing = []
        for head, norm in enumerate(self.norms):
            own = [row for row, which in enumerate(self.tp_heads) if which == head]
            if not own:
                nothing.append(norm(hidden_states[:, :0]))
            rows |= {row: norm(hidden_states[:, row : row + 1]) for row in own}
        return torch.cat([*(rows[row] for row in range(len(self.tp_heads))), *nothing], 1)
