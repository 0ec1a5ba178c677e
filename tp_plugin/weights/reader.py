"""Tensors of a checkpoint's files by name, read slice by slice.

safetensors is a header (its length, then JSON: name -> dtype, shape, offsets) before plain row-major bytes, so a slice
is a few byte ranges. A contiguous slice is read from the file directly into its destination. Any other (columns of a
matrix) is copied from a mapping of the file, with at most :data:`WINDOW` bytes resident. Only the
destination counts towards the memory of the process, and an unreadable disk raises an exception.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tp_plugin.errors import TensorParallelError
from tp_plugin.weights.headers import Entry, header_of, tensors_of_pickle

WINDOW = 8 << 20
"""Bytes of a staging buffer, or of a mapped file, at a time."""
PAGE = mmap.PAGESIZE
"""Bytes of a page, the unit of reading."""
Index = tuple[slice, ...]


class Reader:
    """Open with :meth:`open`; a context manager that closes the files.

    Attributes:
        bytes_read: bytes of tensors requested so far, without headers.
        bytes_touched: bytes of the pages with them, of safetensors files. A host reads at least these from its disk,
            and often full rows, since the system reads ahead.
    """

    def __init__(self, entries: Mapping[str, Entry], tensors: Mapping[str, torch.Tensor]) -> None:
        self._entries, self._tensors = dict(entries), dict(tensors)
        self._files: dict[str, int] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self.bytes_read = self.bytes_touched = 0

    @classmethod
    def open(cls, files: Sequence[str | Path], index: Mapping[str, str] | None = None) -> Reader:
        """Read and check every header; no tensor is read.

        Args:
            files: safetensors files, or pickles (``.bin``) that ``torch.load(weights_only=True)`` can map.
            index: name -> file name, from an index file; each name must be in its file.

        Raises:
            TensorParallelError: on this rank alone: a file is missing, truncated or no checkpoint; a tensor is in two
                files, or not in the file that the index names.
        """
        entries: dict[str, Entry] = {}
        tensors: dict[str, torch.Tensor] = {}
        where: dict[str, str] = {}
        for file in map(str, files):
            if file.endswith(".safetensors"):
                found: Mapping[str, Any] = header_of(file)
                entries |= found
            else:
                found = tensors_of_pickle(file)
                tensors |= found
            for name in found:
                if name in where:
                    raise TensorParallelError(f"tensor {name!r} is in {where[name]!r} and again in {file!r}.")
                where[name] = file
        for name, named in (index or {}).items():
            if Path(where.get(name, "")).name != Path(named).name:
                raise TensorParallelError(
                    f"the checkpoint's index says that tensor {name!r} is in {named!r}, and it is not there; copy the "
                    "checkpoint again."
                )
        return cls(entries, tensors)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; calling it again does nothing."""
        for mapped in self._maps.values():
            mapped.close()
        for descriptor in self._files.values():
            os.close(descriptor)
        self._maps, self._files, self._tensors = {}, {}, {}

    def names(self) -> list[str]:
        """Names of all tensors."""
        return [*self._entries, *self._tensors]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._entries[name].shape if name in self._entries else tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype it is stored in."""
        return self._entries[name].dtype if name in self._entries else self._tensors[name].dtype

    def nbytes(self, name: str) -> int:
        """Its size in the file."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def read(self, name: str, index: Index | None = None) -> torch.Tensor:
        """A slice (None: all) of a tensor, in the dtype it is stored in."""
        index = index or tuple(slice(0, n) for n in self.shape(name))
        out = torch.empty([one.stop - one.start for one in index], dtype=self.dtype(name))
        self.read_into(out, name, index)
        return out

    def read_into(self, out: torch.Tensor, name: str, index: Index | None = None) -> None:
        """Read a slice of a tensor into ``out``, cast to its dtype.

        Args:
            out: shaped as the slice; may be strided.
            index: a slice with start and stop for each dimension, such as those of ``ShardLayout.slices``; None: all.

        Raises:
            TensorParallelError: the file ends before the slice does, on this rank alone.
        """
        index = index or tuple(slice(0, n) for n in self.shape(name))
        shape = tuple(one.stop - one.start for one in index)
        if tuple(out.shape) != shape:
            raise ValueError(f"out has shape {tuple(out.shape)} where the slice of {name!r} has {shape}")
        if not out.numel():
            return
        self.bytes_read += out.numel() * self.dtype(name).itemsize
        if name in self._entries:
            self.bytes_touched += _pages(self._entries[name], index) * PAGE
        with torch.no_grad():
            if name in self._tensors:
                out.copy_(self._tensors[name][index])
            elif self._is_contiguous(name, index):
                self._stream(out, name, index)
            else:
                self._gather(out, name, index)

    def probe(self, name: str) -> str:
        """A hash of a page in the middle of a tensor: enough to tell files of another model apart."""
        if name in self._tensors:
            flat = self._tensors[name].detach().reshape(-1)
            middle = flat[flat.numel() // 2 :][: PAGE // flat.element_size()]
        else:
            entry, size = self._entries[name], self.nbytes(name)
            middle = torch.empty(min(size, PAGE), dtype=torch.uint8)
            self._pread(middle, entry.file, entry.start + (size - len(middle)) // 2)
        data = middle.contiguous().view(torch.uint8).numpy().tobytes() if middle.numel() else b""
        return hashlib.sha256(data).hexdigest()[:12]

    # ---- the two ways of reading -----------------------------------------------------------------------------------

    def _is_contiguous(self, name: str, index: Index) -> bool:
        """Return True if the slice spans every dimension but the first."""
        whole = self.shape(name)
        return all(one.stop - one.start == size for one, size in zip(index[1:], whole[1:], strict=True))

    def _stream(self, out: torch.Tensor, name: str, index: Index) -> None:
        entry = self._entries[name]
        row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        start = entry.start + (index[0].start * row if index else 0)
        if out.is_contiguous() and out.dtype == entry.dtype and out.device.type == "cpu":
            self._pread(out, entry.file, start)
            return
        for first, piece in _rows(out, row) if entry.shape else [(0, out)]:
            staged = torch.empty(piece.shape, dtype=entry.dtype)
            self._pread(staged, entry.file, start + first * row)
            piece.copy_(staged)

    def _pread(self, out: torch.Tensor, file: str, start: int) -> None:
        left = memoryview(out.detach().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        if file not in self._files:
            self._files[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        while left:
            try:
                count = os.preadv(self._files[file], [left], start)
            except OSError as failure:
                raise TensorParallelError(f"cannot read {file!r}: {failure}") from failure
            if not count:
                raise TensorParallelError(f"{file!r} became shorter while it was read.")
            left, start = left[count:], start + count

    def _gather(self, out: torch.Tensor, name: str, index: Index) -> None:
        entry = self._entries[name]
        row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        aligned = entry.start % entry.dtype.itemsize == 0
        columns = (slice(None), *index[1:])
        for first, piece in _rows(out, row):
            start = entry.start + (index[0].start + first) * row
            shape = (piece.shape[0], *entry.shape[1:])
            if aligned:
                whole = self._mapped(entry, start, shape)
            else:  # misaligned by another writer: torch maps aligned elements only
                whole = torch.empty(shape, dtype=entry.dtype)
                self._pread(whole, entry.file, start)
            piece.copy_(whole[columns])
            del whole
            if aligned:
                self._release(entry.file, start, piece.shape[0] * row)

    def _mapped(self, entry: Entry, start: int, shape: tuple[int, ...]) -> torch.Tensor:
        if entry.file not in self._maps:
            with open(entry.file, "rb") as file:
                # private: torch accepts only writable memory; nothing is written
                self._maps[entry.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        mapped = self._maps[entry.file]
        return torch.frombuffer(mapped, dtype=entry.dtype, count=math.prod(shape), offset=start).view(shape)

    def _release(self, file: str, start: int, size: int) -> None:
        """Unmap the pages again: they stay in the page cache and no longer count as this process's."""
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        self._maps[file].madvise(mmap.MADV_DONTNEED, first, start + size - first)


def _rows(out: torch.Tensor, row: int) -> list[tuple[int, torch.Tensor]]:
    """``out`` in pieces along its first dimension that span at most :data:`WINDOW` bytes of the file, or one row."""
    step = max(1, WINDOW // max(row, 1))
    return [(first, out.narrow(0, first, min(step, out.shape[0] - first))) for first in range(0, out.shape[0], step)]


def _pages(entry: Entry, index: Index) -> int:
    """Number of pages of its file in which a slice that is not empty has bytes."""
    run, starts = entry.dtype.itemsize, torch.tensor([entry.start])
    strides = [math.prod(entry.shape[dim + 1 :]) * run for dim in range(len(entry.shape))]
    cut = len(index)
    while cut and index[cut - 1] == slice(0, entry.shape[cut - 1]):
        cut -= 1
    if cut:  # from the last dimension that is not spanned on, a slice is one run of bytes
        run, first = (index[cut - 1].stop - index[cut - 1].start) * strides[cut - 1], index[cut - 1].start
        starts = starts + first * strides[cut - 1]
    else:
        run *= math.prod(entry.shape)
    for dim in reversed(range(cut - 1)):
        offsets = torch.arange(index[dim].start, index[dim].stop) * strides[dim]
        starts = (offsets[:, None] + starts).view(-1)
    first_page, last_page = starts // PAGE, (starts + run - 1) // PAGE
    shared = (first_page[1:] == last_page[:-1]).sum()
    return int((last_page - first_page + 1).sum() - shared)
