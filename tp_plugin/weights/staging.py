"""Files for a directory with other content: one process writes them into a subfolder, then moves them.

:mod:`tp_plugin.weights.atomic` replaces a directory as one; that needs a directory of our own. Here a kill between two
moves can leave a directory without a config, which no library loads, and beside it the files not yet moved.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Collection
from pathlib import Path

from tp_plugin.errors import TensorParallelError
from tp_plugin.weights.atomic import sync

WRITING, MOVING = ".saving-", ".moving-"
"""Prefixes of the folder's name: before its files are moved, and from then on."""
_CONFIGS = ("adapter_config.json", "config.json")  # without a config no library loads the weights beside it


class Staging:
    """A new folder in ``directory``, which is made if it is missing, until the ``with`` block ends.

    Folders of killed jobs are removed unless a process still writes them. Those never moved are removed at the
    beginning, half-moved ones after the files of this save are in place.

    Attributes:
        path: of the folder.

    Raises:
        OSError: from ``with``, if the folder cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / f"{WRITING}{secrets.token_hex(4)}"

    def __enter__(self) -> Staging:
        _sweep(self.directory, WRITING)
        self.path.mkdir(parents=True)
        self._descriptor = os.open(self.path, os.O_RDONLY)
        _locked(self._descriptor)  # until this process ends
        return self

    def __exit__(self, *raised: object) -> None:
        os.close(self._descriptor)
        shutil.rmtree(self.path, ignore_errors=True)  # a folder being moved has another name and stays

    def move_in(self, weights: Collection[str] = (), stale: Collection[Path] = ()) -> list[str]:
        """Sync all files to the disk, then move them into the directory: weights first, configs last.

        Old configs are removed first, so that a mixture of two saves never loads.

        Args:
            weights: files to move by name: other hosts wrote them, and this host's listing of the folder may be stale.
            stale: files to remove first, if they exist.

        Returns:
            the files moved, relative to the directory.

        Raises:
            OSError: nothing in the directory was changed.
            TensorParallelError: moving failed halfway; the message names the folder with the rest.
        """
        if os.fstat(self._descriptor).st_nlink == 0:
            raise OSError(f"another process removed {self.path.name} while it was written")
        listed = {path.relative_to(self.path) for path in self.path.rglob("*") if path.is_file()}
        fresh = sorted(listed | {Path(name) for name in weights})
        for path in fresh:
            sync(self.path / path)
            (self.directory / path).parent.mkdir(parents=True, exist_ok=True)
            if (self.directory / path).is_dir():
                raise IsADirectoryError(f"{str(self.directory / path)!r} is a directory")
        moving = self.directory / f"{MOVING}{self.path.name.removeprefix(WRITING)}"
        self.path.rename(moving)
        try:
            for old in [self.directory / path for path in fresh if path.name in _CONFIGS] + list(stale):
                old.unlink(missing_ok=True)
            for path in sorted(fresh, key=lambda path: (path.name in _CONFIGS, path.suffix != ".safetensors")):
                os.replace(moving / path, self.directory / path)
            sync(self.directory)
        except OSError as failure:
            raise TensorParallelError(
                f"moving files into {str(self.directory)!r} failed halfway ({failure.strerror or failure}); move what "
                f"is left in {str(moving)!r} into it yourself."
            ) from failure
        shutil.rmtree(moving, ignore_errors=True)
        _sweep(self.directory, MOVING)
        return [path.as_posix() for path in fresh]


def _sweep(directory: Path, mark: str) -> None:
    """Remove folders of killed jobs; failures are ignored."""
    for left in directory.glob(f"{mark}*"):
        if not re.fullmatch(re.escape(mark) + "[0-9a-f]{8}", left.name):
            continue
        try:
            descriptor = os.open(left, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            if _locked(descriptor):
                shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(descriptor)


def _locked(handle: int) -> bool:
    """Lock a file; False if another process has the lock, or the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
