"""Sharded layers, the regions they form, and the gradients and random numbers that sharding makes partial."""

from tp_plugin.layers.embedding import VocabParallelEmbedding
from tp_plugin.layers.enter import enter_after
from tp_plugin.layers.experts import ParallelExperts, sum_at_exit
from tp_plugin.layers.head import VocabParallelHead
from tp_plugin.layers.linear import ColumnParallelLinear, RowParallelLinear
from tp_plugin.layers.partial import sum_partial_gradient, sum_shared_gradient
from tp_plugin.layers.region import Region

__all__ = [
    "ColumnParallelLinear",
    "ParallelExperts",
    "Region",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "enter_after",
    "sum_at_exit",
    "sum_partial_gradient",
    "sum_shared_gradient",
]
