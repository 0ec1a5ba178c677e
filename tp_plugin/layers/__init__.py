"""Sharded layers, the regions they form, and the gradients and random numbers that sharding makes partial."""

from tp_plugin.layers.boundary import Boundary
from tp_plugin.layers.dropout import draw_by_rank, draw_in_common
from tp_plugin.layers.experts import ParallelExperts
from tp_plugin.layers.linear import ColumnParallel, ColumnParallelLinear, RowParallel, RowParallelLinear
from tp_plugin.layers.local_arguments import set_local, slice_heads
from tp_plugin.layers.norm import PerHeadNorm, WideRMSNorm
from tp_plugin.layers.partial_gradients import sum_partial_gradient, sum_shared_gradient
from tp_plugin.layers.region import Region
from tp_plugin.layers.vocab import VocabParallelEmbedding, VocabParallelHead

__all__ = [
    "Boundary",
    "ColumnParallel",
    "ColumnParallelLinear",
    "ParallelExperts",
    "PerHeadNorm",
    "Region",
    "RowParallel",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "WideRMSNorm",
    "draw_by_rank",
    "draw_in_common",
    "set_local",
    "slice_heads",
    "sum_partial_gradient",
    "sum_shared_gradient",
]
