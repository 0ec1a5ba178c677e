"""Which checkpoints are whole: sizes and hashes against the manifest, the newest one that passes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch.distributed as dist

from tp_plugin.errors import TensorParallelError
from tp_plugin.weights.container import digest_of
from tp_plugin.weights.fragments import Fragments
from tp_plugin.weights.manifest import FILE, Manifest

LATEST = "latest"
LATEST_GOOD = "latest-good"


def examine(directory: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a checkpoint, in one sentence; None if nothing is.

    Sizes are compared of all files, hashes of every ``shares``-th, beginning with file ``share``: that many processes
    examine one checkpoint together.
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


def examine_together(directory: Path) -> str | None:
    """:func:`examine` by all ranks of the world, each hashing a share; the same answer on all. A collective call."""
    if not dist.is_initialized():
        return examine(directory)
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, examine(directory, dist.get_rank(), dist.get_world_size()))
    return next((sentence for sentence in found if sentence), None)


def candidates(folder: Path) -> list[Path]:
    """Checkpoints in ``folder``, in its ``checkpoint-*`` folders, or beside it if it is one of those; newest first.

    By their step, then by the time they were written. A ``checkpoint-*`` folder counts where HF Trainer has completed
    it, writing its state last.
    """
    folders = [folder]
    if folder.name.startswith("checkpoint-"):
        folders += sorted(folder.parent.glob("checkpoint-*"))
    folders += sorted(folder.glob("checkpoint-*"))
    found = {}
    for one in folders:
        if one.name.startswith("checkpoint-") and not (one / "trainer_state.json").is_file():
            continue
        for path in one.glob(f"*/{FILE}"):
            try:
                found[path.parent] = Manifest.load(path.parent).step, path.stat().st_mtime
            except (TensorParallelError, OSError):
                continue
    return sorted(found, key=lambda path: found[path], reverse=True)


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint of :func:`candidates` that is whole; the same on all ranks. A collective call."""
    paths: list[list[Path]] = [[]]
    if not dist.is_initialized() or dist.get_rank() == 0:
        with contextlib.suppress(OSError):  # a folder that cannot be read offers none
            paths = [candidates(folder)]
    if dist.is_initialized():
        dist.broadcast_object_list(paths)
    return next((path for path in paths[0] if examine_together(path) is None), None)
