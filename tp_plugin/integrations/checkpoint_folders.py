"""Folders of checkpoints, as loops, HF Trainer and Accelerate number them: the newest complete checkpoint in them."""

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
from tp_plugin.weights.fragments import damage_found_together
from tp_plugin.weights.manifest import FILE, Manifest

LATEST = "latest"
"""File with the name of the last checkpoint saved, as DeepSpeed has it."""
LATEST_GOOD = "latest-good"
"""Tag that asks for the newest complete checkpoint."""
_LONGEST_NAME = 1000
"""Characters read of a file that names a checkpoint."""
_NUMBERED = ("checkpoint-*", "checkpoint_*")
_TRAINER_STATE = "trainer_state.json"
_TRAINER_FILES = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth")


def named_by_latest(folder: Path) -> Path | None:
    """The folder that ``latest`` in ``folder`` names; None without such a file.

    Raises:
        TensorParallelError: it names something that is not in ``folder``.
        OSError: it cannot be read.
    """
    file = folder / LATEST
    if not file.is_file():
        return None
    with file.open(errors="replace") as opened:
        name = opened.read(_LONGEST_NAME).strip()
    if name in ("", "..") or Path(name).name != name:
        raise TensorParallelError(f"{str(file)!r} does not name a folder in {str(folder)!r}; name the checkpoint.")
    return folder / name


def checkpoints_in(folder: Path, *, for_trainer: bool = False, beside: bool = True) -> list[Path]:
    """Checkpoints in ``folder``, in numbered folders in it, or beside it if it is numbered itself; newest first.

    They are sorted by step, then by the time of writing. HF Trainer numbers ``checkpoint-N``, Accelerate
    ``checkpoints/checkpoint_N``. One that Trainer wrote counts if Trainer's files are complete too
    (:func:`trainers_damage`), or if ``folder`` is its own folder. ``for_trainer`` leaves out all others. Without
    ``beside`` those beside a numbered folder are left out.
    """
    found = {}
    for one in _searched(folder, beside=beside):
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


def _searched(folder: Path, *, beside: bool = True) -> list[Path]:
    folders = [folder]
    for pattern in _NUMBERED:
        if beside and fnmatch.fnmatch(folder.name, pattern):
            folders += sorted(folder.parent.glob(pattern))
        folders += sorted(folder.glob(pattern))
        folders += sorted(folder.glob(f"checkpoints/{pattern}"))
    return list(dict.fromkeys(folders))


def trainers_damage(folder: Path, step: int, *, needed: bool = False) -> str | None:
    """Describe the damage of HF Trainer's files beside a checkpoint of ``step`` in one sentence; None without damage.

    A folder without such files is not damaged, unless they are ``needed``. Trainer writes its state last, so a folder
    with other files and no state is incomplete. ``torch.save`` makes zip archives with checksums: nothing is unpickled.
    """
    saved = [path for pattern in _TRAINER_FILES for path in sorted(folder.glob(pattern))]
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
    """The newest complete one of :func:`checkpoints_in`, the same on all ranks; None without one. A collective call."""
    paths: list[list[Path]] = [[]]
    if not dist.is_initialized() or dist.get_rank() == 0:
        for one in _searched(folder):
            with contextlib.suppress(OSError):  # a folder that is read-only
                bring_all_back(one)
        with contextlib.suppress(OSError):  # a folder that cannot be read offers none
            paths = [checkpoints_in(folder, for_trainer=for_trainer)]
    if dist.is_initialized():
        dist.broadcast_object_list(paths)
    return next((path for path in paths[0] if damage_found_together(path) is None), None)
