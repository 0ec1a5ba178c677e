"""ShardLayout: the part of one full tensor that each rank of a tensor-parallel group has.

Layers, loading, saving and the gradient norm ask it; index arithmetic is done here only. A layout is pure data,
without process groups and tensors.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch

Interval = tuple[int, int]  # half-open [start, stop) along the sharded dimension of the full tensor


@dataclasses.dataclass(frozen=True)
class ShardLayout:
    """Index intervals of one dimension that each rank holds, in the rank's order.

    Every way to shard in use is such a table: even and uneven splits, packed sub-tensors (``[q|k|v]``,
    ``[gate|up]``), per-head interleaving, and heads that several ranks hold as replicas.

    Attributes:
        shape: shape of the full tensor.
        dim: the sharded dimension (non-negative), or None when every rank holds the full tensor.
        parts: the intervals of each rank; ``()`` for every rank when ``dim`` is None.
    """

    shape: tuple[int, ...]
    dim: int | None
    parts: tuple[tuple[Interval, ...], ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("a layout needs at least one rank")
        if self.dim is None:
            return
        if not 0 <= self.dim < len(self.shape):
            raise ValueError(f"dim {self.dim} is not a dimension of shape {self.shape}")
        ends: list[Interval] = []
        for intervals in self.parts:
            own = sorted(intervals)
            if any(not 0 <= start < stop <= self.shape[self.dim] for start, stop in own):
                raise ValueError(f"an interval of {own} is empty or outside of [0, {self.shape[self.dim]})")
            if any(a[1] > b[0] for a, b in itertools.pairwise(own)):
                raise ValueError(f"a rank holds an index twice: {own}")
            ends += own
        reach = next((stop for start, stop in _union(ends) if start == 0), 0)
        if reach != self.shape[self.dim]:
            raise ValueError(f"index {reach} of dimension {self.dim} is held by no rank")

    # ---- constructors ---------------------------------------------------------------------------------------------

    @classmethod
    def replicated(cls, shape: Sequence[int], ranks: int) -> ShardLayout:
        """Every rank holds everything."""
        return cls(tuple(shape), None, ((),) * ranks)

    @classmethod
    def even(cls, shape: Sequence[int], dim: int, ranks: int, *, unit: int = 1) -> ShardLayout:
        """Parts of nearly equal size, in multiples of ``unit`` (such as a head's size); the first ranks hold one more.

        A rank holds nothing when there are fewer units than ranks.
        """
        size = shape[dim]
        if size % unit:
            raise ValueError(f"size {size} is not a multiple of the unit {unit}")
        return cls.uneven(shape, dim, [n * unit for n in balanced(size // unit, ranks)])

    @classmethod
    def uneven(cls, shape: Sequence[int], dim: int, sizes: Sequence[int]) -> ShardLayout:
        """Consecutive pieces of the given sizes, one a rank."""
        if sum(sizes) != shape[dim]:
            raise ValueError(f"sizes {list(sizes)} do not add up to {shape[dim]}")
        stops = list(itertools.accumulate(sizes))
        return cls(tuple(shape), dim, tuple(_merge([(stop - n, stop)]) for n, stop in zip(sizes, stops, strict=True)))

    @classmethod
    def packed(cls, shape: Sequence[int], dim: int, blocks: Sequence[ShardLayout]) -> ShardLayout:
        """Sub-tensors one behind the other along ``dim``, each with its own layout: ``[q|k|v]``, ``[gate|up]``.

        The sizes of the blocks along ``dim`` must add up to the full size; a block's other dimensions are ignored (a
        replicated block is measured along ``dim``).
        """
        ranks = len(blocks[0].parts)
        own: list[list[Interval]] = [[] for _ in range(ranks)]
        offset = 0
        for block in blocks:
            size = block.shape[dim if block.dim is None else block.dim]
            for rank in range(ranks):
                pieces = block.parts[rank] if block.dim is not None else ((0, size),)
                own[rank] += [(start + offset, stop + offset) for start, stop in pieces]
            offset += size
        if offset != shape[dim]:
            raise ValueError(f"packed blocks add up to {offset}, the dimension has {shape[dim]}")
        return cls(tuple(shape), dim, tuple(_merge(pieces) for pieces in own))

    @classmethod
    def units(cls, shape: Sequence[int], dim: int, unit: int, held: Sequence[Sequence[int]]) -> ShardLayout:
        """Whole units (heads) by number: rank r holds the units ``held[r]``, in that order.

        Serves per-head interleaving, where a unit is one head's ``3 * head_dim`` rows, and replicated heads, where
        several ranks hold the same unit.
        """
        parts = tuple(_merge([(u * unit, (u + 1) * unit) for u in units]) for units in held)
        return cls(tuple(shape), dim, parts)

    def along(self, dim: int, shape: Sequence[int]) -> ShardLayout:
        """The same intervals along ``dim`` of another tensor (a bias, a row-parallel weight)."""
        if self.dim is None:
            return ShardLayout.replicated(shape, self.ranks)
        if shape[dim] != self.shape[self.dim]:
            raise ValueError(f"dimension {dim} of {tuple(shape)} is not the {self.shape[self.dim]} this layout shards")
        return ShardLayout(tuple(shape), dim, self.parts)

    # ---- queries -------------------------------------------------------------------------------------------------

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.parts)

    @property
    def is_sharded(self) -> bool:
        """True if any rank holds less than the full tensor."""
        return self.dim is not None and any(self.local_size(rank) != self.shape[self.dim] for rank in range(self.ranks))

    def local_size(self, rank: int) -> int:
        """Indices of the sharded dimension that ``rank`` holds (0 when there is none)."""
        return sum(stop - start for start, stop in self.parts[rank])

    @property
    def local_sizes(self) -> list[int]:
        """:meth:`local_size` of every rank."""
        return [self.local_size(rank) for rank in range(self.ranks)]

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of the shard of ``rank``."""
        if self.dim is None:
            return self.shape
        return (*self.shape[: self.dim], self.local_size(rank), *self.shape[self.dim + 1 :])

    def slices(self, rank: int) -> list[tuple[slice, ...]]:
        """Index expressions of the full tensor to read, whose results, joined along ``dim``, are the shard."""
        whole = tuple(slice(0, n) for n in self.shape)
        if self.dim is None:
            return [whole]
        return [(*whole[: self.dim], slice(start, stop), *whole[self.dim + 1 :]) for start, stop in self.parts[rank]]

    def rows(self, start: int, stop: int) -> ShardLayout:
        """Layout of ``full[start:stop]``, a run of the first dimension."""
        if not 0 <= start < stop <= self.shape[0]:
            raise ValueError(f"rows {start} to {stop} are empty or lie outside of shape {self.shape}")
        shape = (stop - start, *self.shape[1:])
        if self.dim != 0:
            return ShardLayout(shape, self.dim, self.parts)
        held = [[(max(a, start) - start, min(b, stop) - start) for a, b in part] for part in self.parts]
        return ShardLayout(shape, 0, tuple(_merge([(a, b) for a, b in part if a < b]) for part in held))

    def local_rows(self, rank: int, start: int, stop: int) -> list[Interval]:
        """Rows of the shard of ``rank`` that, one behind the other, are its shard of ``full[start:stop]``."""
        if self.dim != 0:
            return [(start, stop)]
        pieces = self._pieces(rank, lambda a, b: _intersect((a, b), [(start, stop)]))
        return [(local, local + last - first) for first, last, local in pieces]

    def shard(self, full: torch.Tensor, rank: int) -> torch.Tensor:
        """The shard of ``rank``, a contiguous copy (replicated: the tensor itself)."""
        if tuple(full.shape) != self.shape:
            raise ValueError(f"expected the full tensor of shape {self.shape}, got {tuple(full.shape)}")
        if self.dim is None:
            return full
        pieces = [full.narrow(self.dim, start, stop - start) for start, stop in self.parts[rank]]
        return torch.cat(pieces, self.dim).contiguous() if pieces else full.new_empty(self.local_shape(rank))

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """The full tensor of all ranks' shards; of replicas, the owner's counts."""
        if len(shards) != self.ranks:
            raise ValueError(f"expected {self.ranks} shards, got {len(shards)}")
        if self.dim is None:
            return shards[0]
        full = shards[0].new_empty(self.shape)
        for rank, shard in enumerate(shards):
            if tuple(shard.shape) != self.local_shape(rank):
                raise ValueError(f"shard of rank {rank} has shape {tuple(shard.shape)}, not {self.local_shape(rank)}")
            for start, stop, local in self.owned(rank):
                full.narrow(self.dim, start, stop - start).copy_(shard.narrow(self.dim, local, stop - start))
        return full

    def taken_from(self, rank: int, source: ShardLayout) -> list[tuple[int, tuple[slice, ...], tuple[slice, ...]]]:
        """Pieces of the shards of another layout of the same tensor that make up the shard of ``rank``.

        Returns:
            (rank of ``source``, index expression of its shard, index expression of this shard), each element of the
            shard once, from the rank of ``source`` that owns it.
        """
        if source.shape != self.shape:
            raise ValueError(f"a tensor of shape {source.shape} is not one of shape {self.shape}")
        found = []
        for held, other in itertools.product(self._blocks(rank), range(source.ranks)):
            for owned in source._blocks(other, owned=True):
                both = [(max(a[0], b[0]), min(a[1], b[1])) for a, b in zip(held, owned, strict=True)]
                if all(start < stop for start, stop in both):
                    found.append((other, _within(both, owned), _within(both, held)))
        return found

    def _blocks(self, rank: int, *, owned: bool = False) -> list[list[tuple[int, int, int]]]:
        """The shard of ``rank`` (or what it owns of it) as blocks of (start, stop, start in the shard) by dimension."""
        whole = [(0, size, 0) for size in self.shape]
        if self.dim is None:
            return [whole] if rank == 0 or not owned else []
        pieces = self.owned(rank) if owned else self._pieces(rank, lambda start, stop: [(start, stop)])
        return [[*whole[: self.dim], piece, *whole[self.dim + 1 :]] for piece in pieces]

    def owned(self, rank: int) -> list[tuple[int, int, int]]:
        """Intervals that ``rank`` holds and no lower rank does, as (start, stop, start in the shard).

        Each index has exactly one owner, so that the gradient norm and an export count it once.
        """
        taken = list(itertools.chain.from_iterable(self.parts[:rank]))
        return self._pieces(rank, lambda start, stop: _subtract((start, stop), taken))

    def shared(self, rank: int) -> list[tuple[int, int, int]]:
        """Intervals that ``rank`` and another rank hold, as (start, stop, start in the shard).

        The gradient of these replicas is partial on each rank and has to be summed.
        """
        others = list(itertools.chain.from_iterable(p for r, p in enumerate(self.parts) if r != rank))
        return self._pieces(rank, lambda start, stop: _intersect((start, stop), others))

    def shared_intervals(self) -> list[Interval]:
        """Every index that more than one rank holds, as merged intervals; the same on all ranks."""
        return _union([(start, stop) for rank in range(self.ranks) for start, stop, _ in self.shared(rank)])

    def owns_all(self, rank: int) -> bool:
        """True if ``rank`` owns every index that it holds."""
        owned = sum(stop - start for start, stop, _ in self.owned(rank))
        return rank == 0 if self.dim is None else owned == self.local_size(rank)

    def owns_none(self, rank: int) -> bool:
        """True if every index that ``rank`` holds is a replica of a lower rank's."""
        return rank != 0 if self.dim is None else not self.owned(rank)

    def _pieces(self, rank: int, split) -> list[tuple[int, int, int]]:  # type: ignore[no-untyped-def]
        found, local = [], 0
        for start, stop in self.parts[rank]:
            found += [(a, b, local + a - start) for a, b in split(start, stop)]
            local += stop - start
        return found


def balanced(items: int, ranks: int) -> list[int]:
    """Sizes of ``ranks`` parts of ``items`` that differ by at most one, the larger ones first."""
    return [items // ranks + (rank < items % ranks) for rank in range(ranks)]


def _merge(intervals: Sequence[Interval]) -> tuple[Interval, ...]:
    """Neighbours that touch, joined; empty ones dropped; the order kept."""
    out: list[Interval] = []
    for start, stop in intervals:
        if start == stop:
            continue
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((start, stop))
    return tuple(out)


def _union(intervals: Sequence[Interval]) -> list[Interval]:
    """The indices of all intervals, sorted and as few intervals as possible."""
    out: list[Interval] = []
    for start, stop in sorted(intervals):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(stop, out[-1][1]))
        else:
            out.append((start, stop))
    return out


def _within(intervals: Sequence[Interval], block: Sequence[tuple[int, int, int]]) -> tuple[slice, ...]:
    """Index expression, in the shard that contains ``block``, of intervals of the full tensor inside the block."""
    return tuple(
        slice(start - first + local, stop - first + local)
        for (start, stop), (first, _, local) in zip(intervals, block, strict=True)
    )


def _subtract(interval: Interval, taken: Sequence[Interval]) -> list[Interval]:
    bounds = [interval[0], *itertools.chain.from_iterable(_intersect(interval, taken)), interval[1]]
    return [(start, stop) for start, stop in zip(bounds[::2], bounds[1::2], strict=True) if start < stop]


def _intersect(interval: Interval, others: Sequence[Interval]) -> list[Interval]:
    both = [(max(start, interval[0]), min(stop, interval[1])) for start, stop in _union(others)]
    return [(start, stop) for start, stop in both if start < stop]
