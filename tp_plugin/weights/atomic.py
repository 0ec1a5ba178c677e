"""A directory written by all ranks together, completely or not at all.

Files are written into a temporary directory beside the target and synced to the disk; then one rename replaces the
target. If anything fails before, a full disk on one rank or the end of a process, the target is unchanged.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from tp_plugin import log
from tp_plugin.errors import TensorParallelError, agree

MARK = ".tp_plugin-writing-"
"""Prefix of temporary directories: the dot hides them from patterns such as ``global_step*``."""
_ASIDE = "-replaced"
"""Suffix of an old directory that is moved aside on file systems without an atomic exchange."""


@contextlib.contextmanager
def written_whole(directory: str | Path, group: dist.ProcessGroup | None = None) -> Iterator[Path]:
    """Yield a temporary directory that becomes ``directory`` after all ranks have written. A collective call.

    If the body fails on any rank, the temporary directory is removed, ``directory`` stays unchanged and every rank
    raises the failure. An existing directory is replaced as one; a link is followed. Temporary directories of killed
    jobs are removed after :func:`bring_back`. A body may call collectives only if no rank can fail alone before them.

    Args:
        directory: the target, the same on every rank, on a shared file system; its parent is made if it is missing.
        group: the ranks that take part; its first rank renames. None is the whole world, or a single process.

    Raises:
        TensorParallelError: on every rank of ``group``.
    """
    target = Path(directory).absolute()
    if target.is_symlink():
        target = Path(os.path.realpath(target))
    first = not dist.is_initialized() or dist.get_rank(group) == 0
    names = [f"{MARK}{target.name}-{secrets.token_hex(4)}"]
    if dist.is_initialized():
        dist.broadcast_object_list(names, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
    temporary = target.parent / names[0]
    with _agreed(f"writing {str(target)!r} failed", group):
        if first:
            target.parent.mkdir(parents=True, exist_ok=True)
            bring_back(target)
            _remove_left(target)
            temporary.mkdir()
    try:
        with _agreed(f"writing {str(target)!r} failed, and what was there before is untouched", group):
            yield temporary
            for file in temporary.iterdir() if first else ():
                if not file.is_file():
                    raise OSError(f"{file.name} is not a file")
        with _agreed(f"writing {str(target)!r} failed, and what was there before is untouched", group):
            if first:
                sync(temporary)
                _put(temporary, target)
    except TensorParallelError:  # raised on all ranks: none writes any more
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    with _agreed(f"{str(target)!r} is complete and in its place, but syncing it to the disk failed", group):
        if first:
            sync(target.parent)
            _remove_left(target)


def bring_back(target: Path) -> None:
    """Undo a replacement that was killed halfway: rename the old directory, moved aside, back to ``target``.

    Raises OSError.
    """
    if target.exists() or not target.parent.is_dir():
        return
    aside = [path for path in _left(target) if path.name.endswith(_ASIDE)]
    if aside:
        newest = max(aside, key=lambda path: path.stat().st_mtime_ns)
        os.rename(newest, target)
        log.info(f"{str(target)!r} was being replaced when a job ended, and is what it was before", rank0_only=False)


def bring_all_back(folder: Path) -> None:
    """Call :func:`bring_back` for every directory moved aside in ``folder``. Raises OSError."""
    pattern = re.compile(re.escape(MARK) + "(.+)-[0-9a-f]{8}" + _ASIDE)
    for path in sorted(folder.glob(f"{MARK}*{_ASIDE}")):
        if found := pattern.fullmatch(path.name):
            bring_back(folder / found[1])


def write_file(path: Path, content: bytes) -> None:
    """Write a small file completely or not at all, and sync it to the disk."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Sync a directory's entries, or a file's content, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _agreed(failed: str, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Raise any rank's error on every rank; interrupts stay local."""
    error = None
    try:
        yield
    except TensorParallelError as failure:
        error = str(failure)
    except Exception as failure:
        reason = failure.strerror if isinstance(failure, OSError) and failure.strerror else str(failure)
        error = f"{failed}: {type(failure).__name__}: {reason}".replace("\n", " ")
    agree(error, group)


def _left(target: Path) -> list[Path]:
    """Temporary directories of killed jobs beside ``target``; those of other targets are left out."""
    ours = re.compile(re.escape(f"{MARK}{target.name}-") + f"[0-9a-f]{{8}}({_ASIDE})?")
    return [path for path in target.parent.glob(f"{MARK}*") if ours.fullmatch(path.name)]


def _remove_left(target: Path) -> None:
    """Remove temporary directories; failures are ignored, since ``target`` is complete either way."""
    for path in _left(target):
        shutil.rmtree(path, ignore_errors=True)


def _put(source: Path, target: Path) -> None:
    """Rename a directory to ``target``; an existing one is exchanged for it in one step if the system can.

    Otherwise the existing one is moved aside, and back if the rename fails.
    """
    try:
        os.rename(source, target)
        return
    except OSError:
        if not target.is_dir():
            raise
    if _exchange(source, target):
        return
    aside = source.with_name(f"{source.name}{_ASIDE}")
    os.rename(target, aside)
    try:
        os.rename(source, target)
    except OSError:
        os.rename(aside, target)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Linux's ``renameat2(..., RENAME_EXCHANGE)``; False if the system or the file system lacks it."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    here = -100  # AT_FDCWD: the paths are absolute
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), 2) == 0
