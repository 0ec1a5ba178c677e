"""Column- and row-parallel linear layers (Megatron-LM, section 3), made out of the layer they replace.

With ``Y = XW + b`` on two ranks, ``W`` is split by columns, or by rows together with the columns of ``X``::

    column:  X [W1 | W2] + [b1 | b2] = [Y1 | Y2]       input replicated, output sharded

    row:     [X1 | X2] [W1] + b = X1 W1 + X2 W2 + b    input sharded, output summed over the group
                       [W2]

``nn.Linear`` keeps its weight transposed, ``[out, in]``; transformers' ``Conv1D``, in
:mod:`tp_plugin.layers.conv1d`, ``[in, out]``. ``in_features`` and ``out_features`` become the shard's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from tp_plugin.layers.parallel_layer import ParallelLayer, in_place, take_heads


class _ParallelLinear(ParallelLayer):
    """Common to linear layers: conversion of ``nn.Linear``, its subclasses and ``Conv1D``."""

    tp_replaces = nn.Linear

    @classmethod
    def _tp_class_for(cls, module: nn.Module, equivalent: bool) -> type[nn.Module]:
        if is_conv1d(module):
            from tp_plugin.layers.conv1d import ColumnParallelConv1D, RowParallelConv1D

            return ColumnParallelConv1D if issubclass(cls, ColumnParallel) else RowParallelConv1D
        return super()._tp_class_for(module, equivalent)

    def _tp_resize(self, features: int) -> None:
        """Set the number of features that are sharded."""
        raise NotImplementedError


class ColumnParallel(_ParallelLinear):
    """A column-parallel layer of any kind: input replicated ``[..., in]``, output sharded ``[..., out]``.

    Its input enters through the :class:`~tp_plugin.layers.region.Region` that it shares with its siblings.
    """

    tp_hideable = True
    tp_gather: bool  # gather the output for a consumer that is replicated
    tp_outputs: tuple[int, ...] | None  # heads of this rank that the output consists of, if not each of them once

    def tp_setup(self, *, gather: bool = False, outputs: Sequence[int] | None = None) -> None:
        self.tp_gather = gather
        self.tp_outputs = None if outputs is None or in_place(outputs) else tuple(outputs)
        self._tp_resize(self.tp_layout.local_size(self.tp_mesh.tp_rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        if self.tp_outputs is not None:
            out = take_heads(out, self.tp_outputs)
        return self.tp_boundary.leave_gathered(out, self.tp_layout.local_sizes) if self.tp_gather else out


class RowParallel(_ParallelLinear):
    """A row-parallel layer of any kind: input sharded ``[..., in]``, output replicated ``[..., out]``.

    The bias, replicated, is added once, after the sum over the group.
    """

    tp_split: bool  # the input is replicated: take this rank's part of it first
    tp_partial: bool  # the output stays partial: the block around sums it with others

    def tp_setup(self, *, split: bool = False, partial: bool = False) -> None:
        self.tp_split, self.tp_partial = split, partial
        self._tp_resize(self.tp_layout.local_size(self.tp_mesh.tp_rank))

    def _tp_product(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.tp_split:
            x = self.tp_boundary.enter_split(x, self.tp_layout.local_sizes)
        out, bias = self._tp_product(x), self._parameters["bias"]
        if self.tp_partial:
            return out if bias is None else out + self.tp_boundary.add_once(bias).to(out.dtype)
        out = self.tp_boundary.leave(out)
        return out if bias is None else out + bias.to(out.dtype)


class ColumnParallelLinear(ColumnParallel, nn.Linear):
    """Has rows of the weight ``[out, in]``."""

    def _tp_resize(self, features: int) -> None:
        self.out_features = features


class RowParallelLinear(RowParallel, nn.Linear):
    """Has columns of the weight ``[out, in]``."""

    def _tp_resize(self, features: int) -> None:
        self.in_features = features

    def _tp_product(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


def is_conv1d(module: nn.Module) -> bool:
    """Return True for transformers' ``Conv1D``, a linear layer whose weight is ``[in, out]``."""
    return any((c.__module__, c.__name__) == ("transformers.pytorch_utils", "Conv1D") for c in type(module).__mro__)
