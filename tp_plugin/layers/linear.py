"""Column- and row-parallel linear layers (Megatron-LM, section 3), made out of the layer they replace.

Both subclass ``nn.Linear`` and are put in place by changing a module's class: the module, its ``nn.Parameter`` objects
and their names survive. ``in_features`` and ``out_features`` become the shard's, as ``weight.shape`` says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from tp_plugin.collectives import gather_from_region, reduce_from_region, split_to_region
from tp_plugin.layers.partial import add_once
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh


class ColumnParallelLinear(nn.Linear):
    """Holds rows of the weight ``[out, in]``: input replicated ``[..., in]``, output sharded ``[..., out_local]``.

    The input's gradient is summed over the group by the :class:`~tp_plugin.layers.region.Region` whose door this
    module shares with its siblings.
    """

    tp_mesh: ParallelMesh
    tp_layout: ShardLayout
    tp_gather: bool  # join the output for a consumer that is replicated
    tp_repeats: tuple[int, ...] | None  # how often each local KV head is needed, where the local q:kv ratio varies

    def tp_setup(
        self, mesh: ParallelMesh, layout: ShardLayout, *, gather: bool = False, repeats: Sequence[int] | None = None
    ) -> None:
        """Fields for a module whose class has just become this one and whose parameters are shards already."""
        self.tp_mesh, self.tp_layout, self.tp_gather = mesh, layout, gather
        self.tp_repeats = tuple(repeats) if repeats and set(repeats) != {1} else None
        self.out_features = layout.local_size(mesh.tp_rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        if self.tp_repeats is not None:
            heads = out.unflatten(-1, (len(self.tp_repeats), -1)).unbind(-2)
            out = torch.cat([head for head, n in zip(heads, self.tp_repeats, strict=True) for _ in range(n)], -1)
        if self.tp_gather:
            sizes = [self.tp_layout.local_size(rank) for rank in range(self.tp_layout.ranks)]
            out = gather_from_region(out, self.tp_mesh.tp_group, -1, sizes)
        return out

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {shard_repr(self.tp_mesh, self.tp_layout)}"


class RowParallelLinear(nn.Linear):
    """Holds columns of the weight ``[out, in]``: input sharded ``[..., in_local]``, output replicated ``[..., out]``.

    The partial products are summed over the group; the bias, replicated, is added once, after the sum.
    """

    tp_mesh: ParallelMesh
    tp_layout: ShardLayout
    tp_split: bool  # the input comes replicated: take this rank's part of it first
    tp_partial: bool  # the output stays partial, the block around sums it with others

    def tp_setup(
        self, mesh: ParallelMesh, layout: ShardLayout, *, split: bool = False, partial: bool = False
    ) -> None:
        """Fields for a module whose class has just become this one and whose weight is a shard already."""
        self.tp_mesh, self.tp_layout, self.tp_split, self.tp_partial = mesh, layout, split, partial
        self.in_features = layout.local_size(mesh.tp_rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        group = self.tp_mesh.tp_group
        if self.tp_split:
            sizes = [self.tp_layout.local_size(rank) for rank in range(self.tp_layout.ranks)]
            x = split_to_region(x, group, -1, sizes)
        if self.tp_partial:
            return F.linear(x, self.weight, None if self.bias is None else add_once(self.bias, group))
        out = reduce_from_region(F.linear(x, self.weight), group)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {shard_repr(self.tp_mesh, self.tp_layout)}"


def shard_repr(mesh: ParallelMesh, layout: ShardLayout) -> str:
    """For ``print(model)``: which part of what this is."""
    return f"shard {mesh.tp_rank + 1}/{mesh.tp_size} of {list(layout.shape)}"
