"""Sharded layers, the regions they form, and the gradients and random numbers that sharding makes partial."""

from tp_plugin.layers.embedding import VocabParallelEmbedding
from tp_plugin.layers.head import VocabParallelHead
from tp_plugin.layers.linear import ColumnParallelLinear, RowParallelLinear
from tp_plugin.layers.partial import sum_partial_gradient, sum_shared_gradient
from tp_plugin.layers.region import Region

__all__ = [
    "ColumnParallelLinear",
    "Region",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "sum_partial_gradient",
    "sum_shared_gradient",
]
