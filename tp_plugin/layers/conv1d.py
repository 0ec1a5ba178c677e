"""The sharded linear layers for transformers' ``Conv1D``, whose weight is ``[in, out]`` (GPT-2)."""

from __future__ import annotations

import torch
from transformers.pytorch_utils import Conv1D

from tp_plugin.layers.linear import ColumnParallel, RowParallel


class ColumnParallelConv1D(ColumnParallel, Conv1D):
    """Holds columns of the weight ``[in, out]``: input replicated, output sharded."""

    def _tp_resize(self, features: int) -> None:
        self.nf = features


class RowParallelConv1D(RowParallel, Conv1D):
    """Holds rows of the weight ``[in, out]``: input sharded, output replicated."""

    def _tp_resize(self, features: int) -> None:
        self.nx = features

    def _tp_product(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight
