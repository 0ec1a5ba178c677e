"""VocabShard: the shard of a vocabulary on each rank of a group, and how callers name theirs."""

from __future__ import annotations

import dataclasses
import itertools
import weakref

import torch
import torch.distributed as dist

from tp_plugin.collectives import all_gather, rank_in, size_of
from tp_plugin.errors import TensorParallelError, agree
from tp_plugin.layout import balanced


@dataclasses.dataclass(frozen=True, eq=False)
class VocabShard:
    """The consecutive rows ``[start, stop)`` of a vocabulary on this rank. Uneven and empty shards are fine.

    Attributes:
        group: the ranks that shard the vocabulary; None means this rank alone.
        size: words in the full vocabulary, V.
        start: first row of this rank.
        stop: one past the last row of this rank; equal to ``start`` when the rank has none.
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
                f"a vocabulary of {self.size} on {ranks} rank(s) cannot be sharded into sizes {self.sizes}."
            )
        if (self.start, self.stop) != (offsets[rank], offsets[rank + 1]):
            raise TensorParallelError(
                f"rank {rank} of sizes {self.sizes} has rows [{offsets[rank]}, {offsets[rank + 1]}), "
                f"not [{self.start}, {self.stop})."
            )

    @classmethod
    def balanced(cls, size: int, group: dist.ProcessGroup | None) -> VocabShard:
        """As even as can be; the first ranks have one row more."""
        return cls.of_sizes(balanced(size, size_of(group)), group)

    @classmethod
    def of_sizes(cls, sizes: list[int] | tuple[int, ...], group: dist.ProcessGroup | None) -> VocabShard:
        """Consecutive shards of the given sizes, one a rank of ``group``."""
        start = sum(sizes[: rank_in(group)])
        return cls(group, sum(sizes), start, start + sizes[rank_in(group)], tuple(sizes))

    @property
    def rows(self) -> int:
        """Rows of this rank, v."""
        return self.stop - self.start


_AGREED: dict[int, tuple[weakref.ref[torch.Tensor], VocabShard]] = {}
"""Shards that ranks have agreed on, by the id of the tensor. The reference tells a later tensor of the same id apart.

An entry goes with its tensor.
"""


@dataclasses.dataclass(frozen=True)
class VocabArguments:
    """The arguments by which a caller names its shard: ``group`` and ``vocab_size``, or ``vocab``.

    Attributes:
        group: the ranks that shard the vocabulary, in rank order; None: this rank has all of it.
        vocab_size: words in all; None: the sum of the shards.
        vocab: all of that, known to the caller.
    """

    group: dist.ProcessGroup | None
    vocab_size: int | None
    vocab: VocabShard | None

    def resolve(self, tensor: torch.Tensor, rows: int, problem: str | None, has: str) -> VocabShard:
        """The shard that ``rows`` of ``tensor`` are. Without ``vocab`` a collective call, once for each tensor object.

        The ranks exchange their number of rows the first time that they meet a tensor. So a parameter costs one
        exchange in a whole training. A tensor made in each step costs one each step; give its ``VocabShard`` then.

        Args:
            tensor: this rank remembers the agreement by it; ranks must call with the same one alike.
            rows: words of this rank.
            problem: an error that this rank has found already. On the first call with this tensor every rank raises
                it together. On later calls ranks do not wait for each other, and each raises its own.
            has: "weight has 5 rows", for a message.

        Raises:
            TensorParallelError: ``problem``, or shards that do not add up to ``vocab_size``; the same on every rank.
        """
        if self.vocab is not None:
            return self._given(self.vocab, rows, problem, has)
        if self.group is None:
            if problem is None and self.vocab_size not in (None, rows):
                problem = f"one rank alone has {rows} of {self.vocab_size} words; pass the group that shards them."
            if problem is not None:
                raise TensorParallelError(problem)
            return VocabShard.balanced(rows, None)
        entry = _AGREED.get(id(tensor))
        agreed = entry[1] if entry is not None and entry[0]() is tensor else None
        if agreed is None:
            return self._exchange(self.group, tensor, rows, problem)
        if problem is not None:
            raise TensorParallelError(problem)
        if agreed.rows != rows:
            raise TensorParallelError(
                f"this weight tensor had {agreed.rows} rows when the ranks exchanged their sizes and has {rows} now; "
                "pass a new tensor, or its VocabShard as vocab."
            )
        if agreed.group is self.group and self.vocab_size in (None, agreed.size):
            return agreed
        return self._exchange(self.group, tensor, rows, None)

    def _given(self, vocab: VocabShard, rows: int, problem: str | None, has: str) -> VocabShard:
        if self.group is not None or self.vocab_size is not None:
            problem = "vocab contains group and vocab_size; give either vocab or those two."
        elif problem is None and vocab.rows != rows:
            problem = f"this rank has {vocab.rows} rows of the vocabulary, and {has}."
        if problem is not None:
            raise TensorParallelError(problem)
        return vocab

    def _exchange(self, group: dist.ProcessGroup, tensor: torch.Tensor, rows: int, problem: str | None) -> VocabShard:
        """Learn all ranks' sizes, and remember them for ``tensor``; a collective call."""
        agree(problem, group)
        mine = torch.tensor([rows, -1 if self.vocab_size is None else self.vocab_size], device=tensor.device)
        sizes, asked = zip(*(part.tolist() for part in all_gather(mine, group, purpose="setup")), strict=True)
        if len(set(asked)) > 1 or asked[0] not in (-1, sum(sizes)):
            given = "different sizes" if len(set(asked)) > 1 else f"vocab_size {asked[0]}"
            raise TensorParallelError(
                f"the shards of the {len(sizes)} rank(s) have {list(sizes)} rows, {sum(sizes)} in all, but the ranks "
                f"were given {given} ({list(asked)}). Pass each rank its own rows and the group that shards them."
            )
        vocab = VocabShard.of_sizes(sizes, group)
        key = id(tensor)
        _AGREED[key] = weakref.ref(tensor, lambda _: _AGREED.pop(key, None)), vocab
        return vocab
