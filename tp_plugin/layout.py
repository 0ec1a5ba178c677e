"""ShardLayout: how one full tensor lies on the ranks of a tensor-parallel group.

The ground truth that layers, loading, saving and the gradient norm ask; nobody else does index arithmetic.
A layout is pure data: it needs no process group and no tensor, so it can be tested by the thousand.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch

Interval = tuple[int, int]  # half-open [start, stop) along the sharded dimension of the full tensor


@dataclasses.dataclass(frozen=True)
class ShardLayout:
    """Which index intervals of one dimension each rank holds, in the order it holds them.

    Every way to shard in use is such a table: even and uneven splits, packed sub-tensors (``[q|k|v]``,
    ``[gate|up]``), per-head interleaving, and heads that several ranks hold as replicas.

    Attributes:
        shape: shape of the full tensor.
        dim: the sharded dimension (non-negative), or None when every rank holds the whole tensor.
        parts: per rank, the intervals it holds; ``()`` for every rank when ``dim`` is None.
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
                raise ValueError(f"an interval of {own} is empty or lies outside [0, {self.shape[self.dim]})")
            if any(a[1] > b[0] for a, b in itertools.pairwise(own)):
                raise ValueError(f"a rank holds an index twice: {own}")
            ends += own
        reach = 0
        for start, stop in sorted(ends):
            if start > reach:
                break
            reach = max(reach, stop)
        if reach != self.shape[self.dim]:
            raise ValueError(f"index {reach} of dimension {self.dim} is held by no rank")

    # ---- ways to lay a tensor ------------------------------------------------------------------------------------

    @classmethod
    def replicated(cls, shape: Sequence[int], ranks: int) -> ShardLayout:
        """Every rank holds everything."""
        return cls(tuple(shape), None, ((),) * ranks)

    @classmethod
    def even(cls, shape: Sequence[int], dim: int, ranks: int, *, unit: int = 1) -> ShardLayout:
        """As even as can be: in multiples of ``unit`` (a head's size, say), the first ranks holding one more.

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
        """Sub-tensors one behind the other along ``dim``, each laid by its own layout: ``[q|k|v]``, ``[gate|up]``.

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
        """The same pieces for another tensor (a bias, a row-parallel weight) that is cut alike along ``dim``."""
        if self.dim is None:
            return ShardLayout.replicated(shape, self.ranks)
        if shape[dim] != self.shape[self.dim]:
            raise ValueError(f"dimension {dim} of {tuple(shape)} is not the {self.shape[self.dim]} this layout cuts")
        return ShardLayout(tuple(shape), dim, self.parts)

    # ---- what it answers -----------------------------------------------------------------------------------------

    @property
    def ranks(self) -> int:
        """How many ranks the tensor lies on."""
        return len(self.parts)

    @property
    def is_sharded(self) -> bool:
        """Whether any rank holds less than the whole tensor."""
        return self.dim is not None and any(self.local_size(rank) != self.shape[self.dim] for rank in range(self.ranks))

    def local_size(self, rank: int) -> int:
        """Indices of the sharded dimension that ``rank`` holds (0 when there is none)."""
        return sum(stop - start for start, stop in self.parts[rank])

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
        """How ``full[start:stop]``, a run of the first dimension, lies on the ranks."""
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
        found, local = [], 0
        for a, b in self.parts[rank]:
            first, last = max(a, start), min(b, stop)
            if first < last:
                found.append((local + first - a, local + last - a))
            local += b - a
        return found

    def shard(self, full: torch.Tensor, rank: int) -> torch.Tensor:
        """The shard of ``rank``, a contiguous copy (replicated: the tensor itself)."""
        if tuple(full.shape) != self.shape:
            raise ValueError(f"expected the full tensor of shape {self.shape}, got {tuple(full.shape)}")
        if self.dim is None:
            return full
        pieces = [full.narrow(self.dim, start, stop - start) for start, stop in self.parts[rank]]
        if not pieces:
            return full.new_empty(self.local_shape(rank))
        return torch.cat(pieces, self.dim).contiguous()

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """The full tensor of all ranks' shards; where ranks hold replicas, the owner's copy is taken."""
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
        """How the shard of ``rank`` is put together from the shards of another layout of the same tensor.

        Returns:
            (rank of ``source``, index expression of its shard, index expression of this shard), each element of the
            shard once, and each taken from the rank of ``source`` that owns it.
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
        """What ``rank`` holds and no lower rank does, as (start, stop, start in the shard).

        Each index has exactly one owner, so that the gradient norm and an export count it once.
        """
        taken = sorted(itertools.chain.from_iterable(self.parts[:rank]))
        return self._pieces(rank, lambda start, stop: _subtract((start, stop), taken))

    def shared(self, rank: int) -> list[tuple[int, int, int]]:
        """What ``rank`` holds and another rank holds too, as (start, stop, start in the shard).

        The gradient of these replicas is partial on each rank and has to be summed.
        """
        others = sorted(itertools.chain.from_iterable(p for r, p in enumerate(self.parts) if r != rank))
        return self._pieces(rank, lambda start, stop: _intersect((start, stop), others))

    def shared_intervals(self) -> list[Interval]:
        """Every index that more than one rank holds, as merged intervals; the same on all ranks."""
        if self.dim is None:
            return []
        found = [(start, stop) for rank in range(self.ranks) for start, stop, _ in self.shared(rank)]
        merged: list[Interval] = []
        for start, stop in sorted(found):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        return merged

    def owns_all(self, rank: int) -> bool:
        """Whether all that ``rank`` holds is its own to count."""
        if self.dim is None:
            return rank == 0
        return sum(stop - start for start, stop, _ in self.owned(rank)) == self.local_size(rank)

    def owns_none(self, rank: int) -> bool:
        """Whether everything ``rank`` holds is a replica that a lower rank counts."""
        if self.dim is None:
            return rank != 0
        return not self.owned(rank)

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


def _within(intervals: Sequence[Interval], block: Sequence[tuple[int, int, int]]) -> tuple[slice, ...]:
    """Index expression, in the shard that ``block`` lies in, of intervals of the full tensor inside the block."""
    return tuple(
        slice(start - first + local, stop - first + local)
        for (start, stop), (first, _, local) in zip(intervals, block, strict=True)
    )


def _subtract(interval: Interval, taken: Sequence[Interval]) -> list[Interval]:
    start, stop = interval
    out = []
    for a, b in taken:
        if b <= start or a >= stop:
            continue
        if a > start:
            out.append((start, a))
        start = max(start, b)
    if start < stop:
        out.append((start, stop))
    return out


def _intersect(interval: Interval, others: Sequence[Interval]) -> list[Interval]:
    remaining = _subtract(interval, others)
    return _subtract(interval, remaining)
