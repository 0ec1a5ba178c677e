"""Which checkpoints are whole: sizes and hashes against the manifest, the newest one that passes."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import zipfile
import zlib
from pathlib import Path

import torch.distributed as dist

from tp_plugin.errors import TensorParallelError
from tp_plugin.weights.atomic import MARK, bring_all_back
from tp_plugin.weights.container import digest_of
from tp_plugin.weights.fragments import Fragments
from tp_plugin.weights.manifest import FILE, Manifest

LATEST = "latest"
LATEST_GOOD = "latest-good"
_NUMBERED = ("checkpoint-*", "checkpoint_*")
_TRAINER_STATE = "trainer_state.json"
_TRAINERS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth")


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


def candidates(folder: Path, *, for_trainer: bool = False) -> list[Path]:
    """Checkpoints in ``folder``, in the numbered folders in it, or beside it if it is one of those; newest first.

    By their step, then by the time they were written. Numbered are HF Trainer's ``checkpoint-N`` and Accelerate's
    ``checkpoints/checkpoint_N``. One that Trainer wrote counts where Trainer's own files are whole too
    (:func:`trainers_damage`), unless it is the one that was asked for. ``for_trainer`` asks for those alone.
    """
    found = {}
    for one in _searched(folder):
        for path in one.glob(f"*/{FILE}"):
            if path.parent.name.startswith(MARK):
                continue
            try:
                step = Manifest.load(path.parent).step
                trained = for_trainer or one != folder
                if not (trained and trainers_damage(one, step, needed=for_trainer)):
                    found[path.parent] = step, path.stat().st_mtime
            except (TensorParallelError, OSError):
                continue
    return sorted(found, key=lambda path: found[path], reverse=True)


def _searched(folder: Path) -> list[Path]:
    folders = [folder]
    for pattern in _NUMBERED:
        if fnmatch.fnmatch(folder.name, pattern):
            folders += sorted(folder.parent.glob(pattern))
        folders += sorted(folder.glob(pattern))
        folders += sorted(folder.glob(f"checkpoints/{pattern}"))
    return list(dict.fromkeys(folders))


def trainers_damage(folder: Path, step: int, *, needed: bool = False) -> str | None:
    """What is wrong with the files that HF Trainer wrote beside a checkpoint of ``step``, in one sentence, or None.

    Nothing is where Trainer wrote none, unless they are ``needed``. Trainer writes its state last, so a folder without
    it was not completed. ``torch.save`` makes zip archives, which have sums of their own: nothing is unpickled.
    """
    saved = [path for pattern in _TRAINERS for path in sorted(folder.glob(pattern))]
    if not needed and not saved and not (folder / _TRAINER_STATE).is_file():
        return None
    try:
        state = json.loads((folder / _TRAINER_STATE).read_bytes())
        reached = state.get("global_step") if isinstance(state, dict) else None
        if reached != step:
            return f"{str(folder / _TRAINER_STATE)!r} is of step {reached} and the checkpoint beside it of step {step}."
        for path in saved:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    return f"{str(path)!r} is damaged."
    except FileNotFoundError:
        return f"{str(folder)!r} has no {_TRAINER_STATE}, so Trainer did not complete it."
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as failure:
        return f"a file of Trainer's in {str(folder)!r} is damaged: {type(failure).__name__}."
    return None


def newest_whole(folder: Path, *, for_trainer: bool = False) -> Path | None:
    """The newest checkpoint of :func:`candidates` that is whole; the same on all ranks. A collective call."""
    paths: list[list[Path]] = [[]]
    if not dist.is_initialized() or dist.get_rank() == 0:
        for one in _searched(folder):
            with contextlib.suppress(OSError):  # a folder that is read-only
                bring_all_back(one)
        with contextlib.suppress(OSError):  # a folder that cannot be read offers none
            paths = [candidates(folder, for_trainer=for_trainer)]
    if dist.is_initialized():
        dist.broadcast_object_list(paths)
    return next((path for path in paths[0] if examine_together(path) is None), None)
