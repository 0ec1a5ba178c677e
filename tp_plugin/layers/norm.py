"""An RMS norm over a width that lies on several ranks: OLMo 2's norms of all queries and of all keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tp_plugin.collectives import copy_to_region, reduce_from_region
from tp_plugin.layers.linear import in_place, shard_repr, take_heads
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh

PURPOSE = "norm"


class WideRMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)`` (Zhang and Sennrich 2019) for ``x`` [..., width], sharded.

    Only the sum of squares travels, one number a row, in forward and in backward. Where a rank holds heads that
    another one counts too, or uses a head more than once, each is counted once. In fp32, the result in the dtype of
    ``x``. Put in place by changing a module's class.
    """

    weight: nn.Parameter
    tp_mesh: ParallelMesh
    tp_layout: ShardLayout
    tp_outputs: tuple[int, ...] | None
    tp_epsilon: float
    tp_counted: list[tuple[int, int]]  # (start, size) along the input's width of what this rank counts

    def tp_setup(self, mesh: ParallelMesh, layout: ShardLayout, *, outputs: Sequence[int] | None = None) -> None:
        """Fields for a module whose class has just become this one and whose weight is a shard already."""
        self.tp_mesh, self.tp_layout = mesh, layout
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
        group = self.tp_mesh.tp_group
        total = copy_to_region(reduce_from_region(total, group, purpose=PURPOSE), group, purpose=PURPOSE)
        x = x * torch.rsqrt(total / self.tp_layout.shape[0] + self.tp_epsilon)
        weight = self.weight if self.tp_outputs is None else take_heads(self.weight, self.tp_outputs)
        return (weight * x).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {shard_repr(self.tp_mesh, self.tp_layout)}"


EPSILON = ("variance_epsilon", "eps")
"""Attributes of RMS norms that hold the epsilon."""


def _inside(index: int, pieces: list[tuple[int, int]]) -> bool:
    return any(start <= index < start + size for start, size in pieces)
