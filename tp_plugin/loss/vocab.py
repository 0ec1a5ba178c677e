"""VocabShard: how a vocabulary lies on the ranks of a group."""

from __future__ import annotations

import dataclasses
import itertools

import torch.distributed as dist

from tp_plugin.collectives import rank_in, size_of
from tp_plugin.errors import TensorParallelError
from tp_plugin.layout import balanced


@dataclasses.dataclass(frozen=True, eq=False)
class VocabShard:
    """The consecutive rows ``[start, stop)`` of a vocabulary that this rank holds. Uneven and empty shards are fine.

    Attributes:
        group: the ranks that hold the vocabulary together; None means this rank alone.
        size: words in the whole vocabulary, V.
        start: first row of this rank.
        stop: one past the last row of this rank; equal to ``start`` when the rank holds none.
        sizes: rows of every rank, in rank order; they add up to ``size``.

    Raises:
        TensorParallelError: the numbers contradict each other.
    """

    group: dist.ProcessGroup | None
    size: int
    start: int
    stop: int
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        ranks, rank = size_of(self.group), rank_in(self.group)
        offsets = [0, *itertools.accumulate(self.sizes)]
        if len(self.sizes) != ranks or offsets[-1] != self.size or min(self.sizes) < 0:
            raise TensorParallelError(
                f"a vocabulary of {self.size} on {ranks} rank(s) cannot be cut into sizes {self.sizes}."
            )
        if (self.start, self.stop) != (offsets[rank], offsets[rank + 1]):
            raise TensorParallelError(
                f"rank {rank} of sizes {self.sizes} holds rows [{offsets[rank]}, {offsets[rank + 1]}), "
                f"not [{self.start}, {self.stop})."
            )

    @classmethod
    def balanced(cls, size: int, group: dist.ProcessGroup | None) -> VocabShard:
        """As even as can be, the first ranks holding one row more."""
        return cls.of_sizes(balanced(size, size_of(group)), group)

    @classmethod
    def of_sizes(cls, sizes: list[int] | tuple[int, ...], group: dist.ProcessGroup | None) -> VocabShard:
        """Consecutive pieces of the given sizes, one a rank of ``group``."""
        start = sum(sizes[: rank_in(group)])
        return cls(group, sum(sizes), start, start + sizes[rank_in(group)], tuple(sizes))

    @property
    def rows(self) -> int:
        """Rows of this rank, v."""
        return self.stop - self.start
