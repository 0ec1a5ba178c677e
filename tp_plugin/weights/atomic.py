"""A directory that exists whole or not at all, written by all ranks together.

Files go into a temporary directory beside the target, are synced to the disk, and one rename puts the directory in its
place. Whatever happens before, a full disk on one rank or the end of a process, the target is what it was.
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

from tp_plugin.errors import TensorParallelError, agree

MARK = ".tp_plugin-writing-"
"""Begins the names of temporary directories: the dot hides them from patterns such as ``global_step*``."""
_ASIDE = "-replaced"
"""Ends the name of what was in the way, while there is no exchanging."""


@contextlib.contextmanager
def written_whole(directory: str | Path, group: dist.ProcessGroup | None = None) -> Iterator[Path]:
    """A temporary directory to write into, which becomes ``directory`` when all ranks are through. A collective call.

    What the body raises on any rank is raised on all of them, as one sentence, after the temporary directory was
    removed; ``directory`` is as it was. A directory of that name is replaced whole; of a link to one, what it points
    to. Temporary directories that a killed job left of it are removed, once there is no need to take ``directory`` back
    from them (:func:`bring_back`). Bodies may hold collectives only where no rank can fail before them alone.

    Args:
        directory: the target; the folder it lies in is made if it is missing. The same on every rank, on one file
            system that all of them see.
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
    except TensorParallelError:  # raised on all ranks: nobody writes any more
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    with _agreed(f"{str(target)!r} is whole and in its place, but the disk does not confirm it", group):
        if first:
            sync(target.parent)
            _remove_left(target)


def bring_back(target: Path) -> None:
    """Undo a replacement that was killed halfway: ``target`` is missing, and what it was lies aside under another name.

    Raises OSError.
    """
    if target.exists() or not target.parent.is_dir():
        return
    aside = [path for path in _left(target) if path.name.endswith(_ASIDE)]
    if aside:
        newest = max(aside, key=lambda path: path.stat().st_mtime_ns)
        os.rename(newest, target)
        print(f"tp_plugin: {str(target)!r} was being replaced when a job ended, and is what it was before", flush=True)


def bring_all_back(folder: Path) -> None:
    """:func:`bring_back` for whatever lies aside in ``folder``. Raises OSError."""
    pattern = re.compile(re.escape(MARK) + "(.+)-[0-9a-f]{8}" + _ASIDE)
    for path in sorted(folder.glob(f"{MARK}*{_ASIDE}")):
        if found := pattern.fullmatch(path.name):
            bring_back(folder / found[1])


def write_file(path: Path, content: bytes) -> None:
    """A small file, whole or not at all, and on the disk when this returns."""
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
    """Have the disk hold what a directory lists (or what a file contains)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _agreed(what: str, group: dist.ProcessGroup | None) -> Iterator[None]:
    """What the body raises on one rank is raised on all. What has no word for the others (an interrupt) is not held."""
    error = None
    try:
        yield
    except TensorParallelError as failure:
        error = str(failure)
    except Exception as failure:
        reason = failure.strerror if isinstance(failure, OSError) and failure.strerror else str(failure)
        error = f"{what}: {type(failure).__name__}: {reason}".replace("\n", " ")
    agree(error, group)


def _left(target: Path) -> list[Path]:
    """Directories that jobs which wrote ``target`` left beside it; another job may be writing others."""
    ours = re.compile(re.escape(f"{MARK}{target.name}-") + f"[0-9a-f]{{8}}({_ASIDE})?")
    return [path for path in target.parent.glob(f"{MARK}*") if ours.fullmatch(path.name)]


def _remove_left(target: Path) -> None:
    """As far as it goes: what is in its place is whole either way."""
    for path in _left(target):
        shutil.rmtree(path, ignore_errors=True)


def _put(source: Path, target: Path) -> None:
    """Rename a directory; one that is in the way is exchanged for it in one step, where the system can.

    Otherwise it is moved aside for a moment, and back again if its place cannot be taken.
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
    """Linux's ``renameat2(..., RENAME_EXCHANGE)``; False where the system or the file system has none."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    here = -100  # AT_FDCWD: the paths are absolute
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), 2) == 0
