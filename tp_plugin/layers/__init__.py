"""Sharded layers, the regions they form, and the gradients and random numbers that sharding makes partial."""

from tp_plugin.layers.dropout import draw_by_rank, draw_in_common
from tp_plugin.layers.each_head import EachHead
from tp_plugin.layers.embedding import VocabParallelEmbedding
from tp_plugin.layers.enter import count_once, enter_after
from tp_plugin.layers.experts import ParallelExperts, sum_at_exit
from tp_plugin.layers.head import VocabParallelHead
from tp_plugin.layers.linear import ColumnParallel, ColumnParallelLinear, RowParallel, RowParallelLinear
from tp_plugin.layers.local import set_local, slice_heads
from tp_plugin.layers.norm import WideRMSNorm
from tp_plugin.layers.partial import sum_partial_gradient, sum_shared_gradient
from tp_plugin.layers.region import Region

__all__ = [
    "ColumnParallel",
    "ColumnParallelLinear",
    "EachHead",
    "ParallelExperts",
    "Region",
    "RowParallel",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "WideRMSNorm",
    "count_once",
    "draw_by_rank",
    "draw_in_common",
    "enter_after",
    "set_local",
    "slice_heads",
    "sum_at_exit",
    "sum_partial_gradient",
    "sum_shared_gradient",
]
