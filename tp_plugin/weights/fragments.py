"""Fragments of a checkpoint: checked, and joined into shards of any layout and any range."""

from __future__ import annotations

import bisect
import math
from pathlib import Path

import torch
import torch.distributed as dist

from tp_plugin.errors import TensorParallelError
from tp_plugin.layout import ShardLayout
from tp_plugin.weights.manifest import FILE, WEIGHT, Manifest
from tp_plugin.weights.reader import Reader
from tp_plugin.weights.safetensors_file import digest_of, dtype_named


def fragment_key(kind: str, name: str, start: int) -> str:
    """The key of a fragment in its file."""
    return f"{kind}|{name}|{start}"


class Fragments:
    """The tensors of a checkpoint. Files are opened and their headers read at once, tensors on request.

    Raises:
        TensorParallelError: a file cannot be read, or elements are in no fragment or in two.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.manifest = directory, manifest
        self._files: dict[str, Reader] = {}
        # (kind, name, tp rank) -> fragments in order: (start, stop, file, key)
        self._pieces: dict[tuple[str, str, int], list[tuple[int, int, Reader, str]]] = {}
        for file_name, record in manifest.files.items():
            try:
                file = self._files[file_name] = Reader.open([directory / file_name])
            except TensorParallelError as failure:
                raise TensorParallelError(f"the checkpoint {str(directory)!r} is damaged: {failure}") from failure
            for key in file.names():
                kind, _, rest = key.partition("|")
                name, _, start = rest.rpartition("|")
                if name in manifest.entries:
                    piece = (int(start), int(start) + math.prod(file.shape(key)), file, key)
                    self._pieces.setdefault((kind, name, record.tp_rank), []).append(piece)
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[:2])
        self._check()

    def _check(self) -> None:
        for (kind, name, rank), pieces in self._pieces.items():
            self._complete(kind, name, rank, pieces)
        optimizer = self.manifest.optimizer or {}
        for name, entry in self.manifest.entries.items():
            kinds = [WEIGHT, *(optimizer.get("elementwise", []) if entry.trained else [])]
            for rank in range(self.manifest.tp if entry.layout.dim is not None else 1):
                for kind in kinds if entry.stored and not entry.layout.owns_none(rank) else ():
                    pieces = self._pieces.get((kind, name, rank), [])
                    if kind == WEIGHT or pieces or name not in optimizer.get("stateless", ()):
                        self._complete(kind, name, rank, pieces)

    def _complete(self, kind: str, name: str, rank: int, pieces: list) -> None:
        reach, size = 0, math.prod(self.manifest.entries[name].layout.local_shape(rank))
        for start, stop, _, _ in pieces:
            if start != reach:
                break
            reach = stop
        if reach != size:
            raise TensorParallelError(
                f"the checkpoint {str(self.directory)!r} is damaged: its files hold {reach} of the {size} elements of "
                f"{kind} of {name!r} of tensor-parallel rank {rank}."
            )

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def has(self, kind: str, name: str) -> bool:
        """Return True if the checkpoint has that state of that parameter."""
        entry = self.manifest.entries[name]
        return any((kind, name, rank) in self._pieces for rank in range(entry.layout.ranks))

    def dtype(self, kind: str, name: str) -> torch.dtype:
        """The stored dtype."""
        for rank in range(self.manifest.entries[name].layout.ranks):
            for _, _, file, key in self._pieces.get((kind, name, rank), ()):
                return file.dtype(key)
        return dtype_named(self.manifest.entries[name].dtype)

    def extra(self, key: str, rank: int = 0) -> torch.Tensor | None:
        """A tensor that is no fragment, from the file of a rank; None if the file lacks it."""
        file = list(self._files.values())[rank]
        return file.read(key) if key in file.names() else None

    def flat(
        self, kind: str, name: str, layout: ShardLayout, rank: int, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """Elements ``[start, stop)`` of the flattened shard of ``rank`` in ``layout``; 1-D, on the CPU.

        Only the range is read if the checkpoint has the same shard; otherwise at most two shards are in memory.
        """
        source = self.manifest.entries[name].layout
        stop = math.prod(layout.local_shape(rank)) if stop is None else stop
        if start == stop:
            return torch.empty(0, dtype=self.dtype(kind, name))
        for other in range(source.ranks):
            alike = source.dim == layout.dim and source.parts[other] == layout.parts[rank]
            if (alike or (source.dim is None and layout.dim is None)) and (kind, name, other) in self._pieces:
                return self._read(kind, name, other, start, stop)
        shard = torch.empty(layout.local_shape(rank), dtype=self.dtype(kind, name))
        read: tuple[int, torch.Tensor] = (-1, shard)
        for other, theirs, ours in sorted(layout.taken_from(rank, source), key=lambda piece: piece[0]):
            if read[0] != other:
                shape = source.local_shape(other)
                read = other, self._read(kind, name, other, 0, math.prod(shape)).reshape(shape)
            shard[ours] = read[1][theirs]
        return shard.reshape(-1)[start:stop]

    def full(self, kind: str, name: str) -> torch.Tensor:
        """The full tensor."""
        layout = ShardLayout.replicated(self.manifest.entries[name].layout.shape, 1)
        return self.flat(kind, name, layout, 0).reshape(layout.shape)

    def _read(self, kind: str, name: str, rank: int, start: int, stop: int) -> torch.Tensor:
        pieces = self._pieces[kind, name, rank]
        index = bisect.bisect_right(pieces, start, key=lambda piece: piece[0]) - 1
        found = []
        for first, last, file, key in pieces[index:]:
            if first >= stop:
                break
            if last > start:
                found.append(file.read(key, (slice(max(start - first, 0), min(stop, last) - first),)))
        return found[0] if len(found) == 1 else torch.cat(found)


def damage_of(directory: Path, share: int = 0, shares: int = 1) -> str | None:
    """Describe the damage of a checkpoint in one sentence; None if it is complete.

    Sizes of all files are compared, and hashes of every ``shares``-th from file ``share`` on: that many processes check
    one checkpoint together.
    """
    try:
        manifest = Manifest.load(directory)
        for name, record in manifest.files.items():
            path = directory / name
            if Path(name).name != name:
                return f"the checkpoint {str(directory)!r} is damaged: {FILE} names a file outside of it."
            if not path.is_file():
                return f"the checkpoint {str(directory)!r} is damaged: {name} is missing."
            if path.stat().st_size != record.bytes:
                return (
                    f"the checkpoint {str(directory)!r} is damaged: {name} has {path.stat().st_size} bytes and was "
                    f"written with {record.bytes}."
                )
        for name in list(manifest.files)[share::shares]:
            if digest_of(directory / name) != manifest.files[name].sha256:
                return f"the checkpoint {str(directory)!r} is damaged: the content of {name} has changed."
        Fragments(directory, manifest).close()
    except TensorParallelError as damaged:
        return str(damaged)
    except OSError as failure:
        return f"the checkpoint {str(directory)!r} cannot be read: {failure.strerror or failure}."
    return None


def damage_found_together(directory: Path) -> str | None:
    """:func:`damage_of`, each rank of the world hashing a share; the same on all ranks. A collective call."""
    if not dist.is_initialized():
        return damage_of(directory)
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, damage_of(directory, dist.get_rank(), dist.get_world_size()))
    return next((sentence for sentence in found if sentence), None)
