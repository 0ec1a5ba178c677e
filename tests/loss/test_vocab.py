"""How a vocabulary lies on the ranks."""

import pytest
import torch.distributed as dist

from tests.support.ranks import on_ranks
from tp_plugin.errors import TensorParallelError
from tp_plugin.loss import VocabShard


def shards():
    found = []
    for size in (7, 2):
        vocab = VocabShard.balanced(size, dist.group.WORLD)
        found.append((vocab.start, vocab.stop, vocab.rows, vocab.sizes))
    with pytest.raises(TensorParallelError, match="cannot be sharded"):
        VocabShard(dist.group.WORLD, 7, 0, 3, (3, 3, 2))
    with pytest.raises(TensorParallelError, match="has rows"):
        VocabShard(dist.group.WORLD, 8, 1, 4, (3, 3, 2))
    return found


def test_uneven_and_empty_shards():
    assert on_ranks(3, shards) == [
        [(0, 3, 3, (3, 2, 2)), (0, 1, 1, (1, 1, 0))],
        [(3, 5, 2, (3, 2, 2)), (1, 2, 1, (1, 1, 0))],
        [(5, 7, 2, (3, 2, 2)), (2, 2, 0, (1, 1, 0))],
    ]


def test_one_rank_holds_everything():
    vocab = VocabShard.balanced(7, None)
    assert (vocab.start, vocab.stop, vocab.sizes) == (0, 7, (7,))
