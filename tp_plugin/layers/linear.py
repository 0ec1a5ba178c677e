"""Column- and row-parallel linear layers (Megatron-LM, section 3), made out of the layer they replace.

They subclass ``nn.Linear`` (transformers' ``Conv1D`` in :mod:`tp_plugin.layers.conv1d`) and are put in place by
changing a module's class: the module, its ``nn.Parameter`` objects and their names survive. ``in_features`` and
``out_features`` become the shard's, as ``weight.shape`` says.
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


class ColumnParallel(nn.Module):
    """What column-parallel layers of every kind share: input replicated ``[..., in]``, output sharded ``[..., out]``.

    The input's gradient is summed over the group by the :class:`~tp_plugin.layers.region.Region` whose door this
    module shares with its siblings.
    """

    tp_mesh: ParallelMesh
    tp_layout: ShardLayout
    tp_gather: bool  # join the output for a consumer that is replicated
    tp_outputs: tuple[int, ...] | None  # the held heads the output consists of, where it is not each of them once

    def tp_setup(
        self, mesh: ParallelMesh, layout: ShardLayout, *, gather: bool = False, outputs: Sequence[int] | None = None
    ) -> None:
        """Fields for a module whose class has just become this one and whose parameters are shards already."""
        self.tp_mesh, self.tp_layout, self.tp_gather = mesh, layout, gather
        self.tp_outputs = None if outputs is None or in_place(outputs) else tuple(outputs)
        self._tp_resize(layout.local_size(mesh.tp_rank))

    def _tp_resize(self, features: int) -> None:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        if self.tp_outputs is not None:
            out = take_heads(out, self.tp_outputs)
        if self.tp_gather:
            sizes = [self.tp_layout.local_size(rank) for rank in range(self.tp_layout.ranks)]
            out = gather_from_region(out, self.tp_mesh.tp_group, -1, sizes)
        return out

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {shard_repr(self.tp_mesh, self.tp_layout)}"


class RowParallel(nn.Module):
    """What row-parallel layers of every kind share: input sharded ``[..., in]``, output replicated ``[..., out]``.

    The partial products are summed over the group; the bias, replicated, is added once, after the sum.
    """

    tp_mesh: ParallelMesh
    tp_layout: ShardLayout
    tp_split: bool  # the input comes replicated: take this rank's part of it first
    tp_partial: bool  # the output stays partial: the block around sums it with others

    def tp_setup(self, mesh: ParallelMesh, layout: ShardLayout, *, split: bool = False, partial: bool = False) -> None:
        """Fields for a module whose class has just become this one and whose weight is a shard already."""
        self.tp_mesh, self.tp_layout, self.tp_split, self.tp_partial = mesh, layout, split, partial
        self._tp_resize(layout.local_size(mesh.tp_rank))

    def _tp_resize(self, features: int) -> None:
        raise NotImplementedError

    def _tp_product(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        group = self.tp_mesh.tp_group
        if self.tp_split:
            sizes = [self.tp_layout.local_size(rank) for rank in range(self.tp_layout.ranks)]
            x = split_to_region(x, group, -1, sizes)
        out, bias = self._tp_product(x), self._parameters["bias"]
        if self.tp_partial:
            return out if bias is None else out + add_once(bias, group).to(out.dtype)
        out = reduce_from_region(out, group)
        return out if bias is None else out + bias.to(out.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {shard_repr(self.tp_mesh, self.tp_layout)}"


class ColumnParallelLinear(ColumnParallel, nn.Linear):
    """Holds rows of the weight ``[out, in]``."""

    def _tp_resize(self, features: int) -> None:
        self.out_features = features


class RowParallelLinear(RowParallel, nn.Linear):
    """Holds columns of the weight ``[out, in]``."""

    def _tp_resize(self, features: int) -> None:
        self.in_features = features

    def _tp_product(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


def in_place(outputs: Sequence[int]) -> bool:
    """Whether these are all held heads, each once and in order."""
    return list(outputs) == list(range(len(outputs)))


def take_heads(x: torch.Tensor, outputs: Sequence[int]) -> torch.Tensor:
    """Heads by number along the last dimension, which holds ``max(outputs) + 1`` of them: ``[..., n * head]``."""
    heads = x.unflatten(-1, (max(outputs) + 1, -1)).unbind(-2)
    return torch.cat([heads[number] for number in outputs], -1)


def shard_repr(mesh: ParallelMesh, layout: ShardLayout) -> str:
    """For ``print(model)``: which part of what this is."""
    return f"shard {mesh.tp_rank + 1}/{mesh.tp_size} of {list(layout.shape)}"
