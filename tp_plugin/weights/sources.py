"""Sources of elements that have not been read: tensors of a checkpoint, and views, casts and joins of others.

A source reads any part of itself directly into its destination, without the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from tp_plugin.weights.reader import Index, Reader


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A source of elements: ``shape``, ``dtype`` and a way to read a part."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def read_into(self, out: torch.Tensor, index: Index) -> None:
        raise NotImplementedError

    def whole(self) -> torch.Tensor:
        out = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(out, tuple(slice(0, n) for n in self.shape))
        return out


@dataclasses.dataclass(frozen=True, eq=False)
class Stored(Source):
    """A tensor of a checkpoint."""

    reader: Reader
    name: str

    def read_into(self, out: torch.Tensor, index: Index) -> None:
        self.reader.read_into(out, self.name, index)


@dataclasses.dataclass(frozen=True, eq=False)
class Made(Source):
    """A tensor in memory."""

    tensor: torch.Tensor

    def read_into(self, out: torch.Tensor, index: Index) -> None:
        out.copy_(self.tensor[index])


@dataclasses.dataclass(frozen=True, eq=False)
class Cast(Source):
    """``of`` in another dtype."""

    of: Source

    def read_into(self, out: torch.Tensor, index: Index) -> None:
        if out.dtype == self.dtype:
            self.of.read_into(out, index)
            return
        rounded = torch.empty(out.shape, dtype=self.dtype)
        self.of.read_into(rounded, index)
        out.copy_(rounded)


@dataclasses.dataclass(frozen=True, eq=False)
class Part(Source):
    """``of`` from ``start`` along ``dim``."""

    of: Source
    dim: int
    start: int

    def read_into(self, out: torch.Tensor, index: Index) -> None:
        here = index[self.dim]
        moved = slice(here.start + self.start, here.stop + self.start)
        self.of.read_into(out, (*index[: self.dim], moved, *index[self.dim + 1 :]))


@dataclasses.dataclass(frozen=True, eq=False)
class Squeezed(Source):
    """``of`` without its dimension ``dim`` of size 1."""

    of: Source
    dim: int

    def read_into(self, out: torch.Tensor, index: Index) -> None:
        self.of.read_into(out.unsqueeze(self.dim), (*index[: self.dim], slice(0, 1), *index[self.dim :]))


@dataclasses.dataclass(frozen=True, eq=False)
class Unsqueezed(Source):
    """``of`` with a new dimension ``dim`` of size 1."""

    of: Source
    dim: int

    def read_into(self, out: torch.Tensor, index: Index) -> None:
        self.of.read_into(out.squeeze(self.dim), (*index[: self.dim], *index[self.dim + 1 :]))


@dataclasses.dataclass(frozen=True, eq=False)
class Transposed(Source):
    """``of`` with two dimensions exchanged."""

    of: Source
    first: int
    second: int

    def read_into(self, out: torch.Tensor, index: Index) -> None:
        turned = list(index)
        turned[self.first], turned[self.second] = index[self.second], index[self.first]
        self.of.read_into(out.transpose(self.first, self.second), tuple(turned))


@dataclasses.dataclass(frozen=True, eq=False)
class Joined(Source):
    """``parts`` concatenated along ``dim``."""

    parts: tuple[Source, ...]
    dim: int

    def read_into(self, out: torch.Tensor, index: Index) -> None:
        here, offset = index[self.dim], 0
        for part in self.parts:
            start, stop = max(here.start, offset), min(here.stop, offset + part.shape[self.dim])
            if start < stop:
                inner = (*index[: self.dim], slice(start - offset, stop - offset), *index[self.dim + 1 :])
                part.read_into(out.narrow(self.dim, start - here.start, stop - start), inner)
            offset += part.shape[self.dim]


@dataclasses.dataclass(frozen=True, eq=False)
class Computed(Source):
    """Output ``item`` (None: the only one) of an operation on full operands, computed again for every reading."""

    compute: Callable[[], Any]
    item: int | None

    def read_into(self, out: torch.Tensor, index: Index) -> None:
        found = self.compute()
        out.copy_((found if self.item is None else found[self.item])[index])
