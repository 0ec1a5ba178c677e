"""Tensors that have not been read: transformers renames, joins and casts them, and only what a rank holds is read.

An :class:`Unread` has a shape and a dtype and knows where its elements come from. Slicing, transposing, joining and
casting one gives another that knows the same, so transformers' own conversions (per-expert matrices stacked into one
parameter, a packed projection cut in three) run on them as they are. An operation we do not know is put off as well:
its operands are then read whole, when a part of its result is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from tp_plugin.weights.reader import Index, Reader

aten = torch.ops.aten


class Unread(torch.Tensor):
    """A tensor whose elements are read by :meth:`read_into` or :meth:`read`, and by nothing else."""

    source: Source

    @staticmethod
    def __new__(cls, source: Source) -> Unread:
        made = torch.Tensor._make_wrapper_subclass(cls, source.shape, dtype=source.dtype, device=torch.device("cpu"))
        made.source = source
        return made

    def __init__(self, source: Source) -> None: ...

    def read(self) -> torch.Tensor:
        """All of it."""
        return self.source.whole()

    def read_into(self, out: torch.Tensor, index: Index) -> None:
        """The part at ``index`` (a slice with start and stop for each dimension), cast to the dtype of ``out``."""
        self.source.read_into(out, index)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Unread(shape={list(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        known = _VIEWS.get(func)
        if known is not None:
            found = known(*args, **kwargs)
            if found is not None:
                return tree_map(lambda one: Unread(one) if isinstance(one, Source) else one, found)
        return _put_off(func, args, kwargs)


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Where elements come from: ``shape``, ``dtype`` and how a part is read."""

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
    """A tensor that is there already."""

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
class Chosen(Source):
    """Entry ``entry`` of ``of`` along ``dim``, which is gone."""

    of: Source
    dim: int
    entry: int

    def read_into(self, out: torch.Tensor, index: Index) -> None:
        here = slice(self.entry, self.entry + 1)
        self.of.read_into(out.unsqueeze(self.dim), (*index[: self.dim], here, *index[self.dim :]))


@dataclasses.dataclass(frozen=True, eq=False)
class Swapped(Source):
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
    """``parts`` one behind the other along ``dim``."""

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
class Stacked(Source):
    """``parts`` as the entries of a new dimension ``dim``."""

    parts: tuple[Source, ...]
    dim: int

    def read_into(self, out: torch.Tensor, index: Index) -> None:
        here = index[self.dim]
        inner = (*index[: self.dim], *index[self.dim + 1 :])
        for place, number in enumerate(range(here.start, here.stop)):
            self.parts[number].read_into(out.select(self.dim, place), inner)


@dataclasses.dataclass(frozen=True, eq=False)
class Computed(Source):
    """Output ``item`` (None: the only one) of an operation on whole operands, computed anew for every reading."""

    compute: Callable[[], Any]
    item: int | None

    def read_into(self, out: torch.Tensor, index: Index) -> None:
        found = self.compute()
        out.copy_((found if self.item is None else found[self.item])[index])


def _put_off(func: Any, args: tuple, kwargs: dict) -> Any:
    """What ``func`` gives, its shape from meta tensors, its elements from operands that are read when asked for."""
    if func is aten.equal.default and args[0] is args[1]:
        return True

    def empty(one: Any) -> Any:
        return torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="meta") if _is(one) else one

    def compute() -> Any:
        def read(one: Any) -> Any:
            return one.read() if isinstance(one, Unread) else one

        return func(*tree_map(read, args), **tree_map(read, kwargs))

    if func._schema.is_mutable:
        raise NotImplementedError(f"{func} would change a tensor that has not been read")
    shaped = func(*tree_map(empty, args), **tree_map(empty, kwargs))
    if isinstance(shaped, torch.Tensor):
        return Unread(Computed(tuple(shaped.shape), shaped.dtype, compute, None))
    if isinstance(shaped, list | tuple) and all(isinstance(one, torch.Tensor) for one in shaped):
        return [Unread(Computed(tuple(one.shape), one.dtype, compute, item)) for item, one in enumerate(shaped)]
    return compute()  # a number


def _is(one: Any) -> bool:
    return isinstance(one, torch.Tensor)


def _source(tensor: torch.Tensor) -> Source:
    if isinstance(tensor, Unread):
        return tensor.source
    return Made(tuple(tensor.shape), tensor.dtype, tensor)


def _same(tensor: torch.Tensor, **_: Any) -> Source:
    return _source(tensor)


def _to(tensor: torch.Tensor, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Source | None:
    source = _source(tensor)
    if device is not None and torch.device(device).type != "cpu":
        return None
    return source if dtype in (None, source.dtype) else Cast(source.shape, dtype, source)


def _cut(source: Source, dim: int, start: int, stop: int) -> Source:
    shape = (*source.shape[:dim], stop - start, *source.shape[dim + 1 :])
    return source if shape == source.shape else Part(shape, source.dtype, source, dim, start)


def _slice(
    tensor: torch.Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Source | None:
    if step != 1:
        return None
    first, last, _ = slice(start, end).indices(tensor.shape[dim])
    return _cut(_source(tensor), dim % tensor.dim(), first, max(first, last))


def _select(tensor: torch.Tensor, dim: int, index: int) -> Source:
    source, dim = _source(tensor), dim % tensor.dim()
    entry = index % source.shape[dim]
    return Chosen((*source.shape[:dim], *source.shape[dim + 1 :]), source.dtype, source, dim, entry)


def _unbind(tensor: torch.Tensor, dim: int = 0) -> list[Source]:
    return [_select(tensor, dim, entry) for entry in range(tensor.shape[dim])]


def _split(tensor: torch.Tensor, size: int | Sequence[int], dim: int = 0) -> list[Source]:
    whole = tensor.shape[dim]
    sizes = [min(size, whole - start) for start in range(0, whole, size)] if isinstance(size, int) else list(size)
    out, start = [], 0
    for one in sizes:
        out.append(_cut(_source(tensor), dim % tensor.dim(), start, start + one))
        start += one
    return out


def _transpose(tensor: torch.Tensor, first: int, second: int) -> Source:
    source, first, second = _source(tensor), first % tensor.dim(), second % tensor.dim()
    shape = list(source.shape)
    shape[first], shape[second] = shape[second], shape[first]
    return Swapped(tuple(shape), source.dtype, source, first, second)


def _squeeze(tensor: torch.Tensor, dim: int) -> Source:
    return _select(tensor, dim, 0) if tensor.shape[dim] == 1 else _source(tensor)


def _unsqueeze(tensor: torch.Tensor, dim: int) -> Source:
    return _stack([tensor], dim)


def _cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> Source | None:
    parts = tuple(map(_source, tensors))
    if len({part.dtype for part in parts}) > 1 or len({len(part.shape) for part in parts}) > 1:
        return None
    dim %= len(parts[0].shape)
    rest = {(*part.shape[:dim], *part.shape[dim + 1 :]) for part in parts}
    if len(rest) > 1:
        raise ValueError(f"tensors of shapes {[list(part.shape) for part in parts]} cannot be joined along {dim}")
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return Joined(tuple(shape), parts[0].dtype, parts, dim)


def _stack(tensors: Sequence[torch.Tensor], dim: int = 0) -> Source:
    parts = tuple(map(_source, tensors))
    if len({(part.shape, part.dtype) for part in parts}) > 1:
        raise ValueError(f"tensors of shapes {sorted({part.shape for part in parts})} cannot be stacked")
    dim %= len(parts[0].shape) + 1
    shape = (*parts[0].shape[:dim], len(parts), *parts[0].shape[dim:])
    return Stacked(shape, parts[0].dtype, parts, dim)


_VIEWS: dict[Any, Callable[..., Any]] = {
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.clone.default: _same,
    aten._to_copy.default: _to,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.transpose.int: _transpose,
    aten.squeeze.dim: _squeeze,
    aten.unsqueeze.default: _unsqueeze,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
}
