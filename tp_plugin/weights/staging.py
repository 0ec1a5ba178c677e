"""Files for a directory that holds others too: written aside in it by one process, then moved to their places.

A directory that is ours alone is written as :mod:`tp_plugin.weights.atomic` does, whole or not at all. Here a kill
between two moves can leave a directory without a config, which nobody loads, and what was not moved yet beside it.
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
"""Begin the names of the folder: before its files are moved, and since."""
_CONFIGS = ("adapter_config.json", "config.json")  # without one nobody loads what lies beside


class Staging:
    """A new folder in ``directory``, which is made if it is missing, until the ``with`` block ends.

    What jobs that were killed left is removed, if no process is still at it: files that were written but not moved
    at the beginning, half-moved ones once those of this save are in place.

    Attributes:
        path: of the folder.

    Raises:
        OSError: from ``with``, when the folder cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / f"{WRITING}{secrets.token_hex(4)}"

    def __enter__(self) -> Staging:
        _sweep(self.directory, WRITING)
        self.path.mkdir(parents=True)
        self._held = os.open(self.path, os.O_RDONLY)
        _locked(self._held)  # for as long as this process is there
        return self

    def __exit__(self, *raised: object) -> None:
        os.close(self._held)
        shutil.rmtree(self.path, ignore_errors=True)  # not what is being moved: it may be all there is

    def move_in(self, weights: Collection[str] = (), stale: Collection[Path] = ()) -> list[str]:
        """Move what was written into the directory, once all of it is on the disk: weights first, configs last.

        Configs that are replaced are removed before, so that nobody loads a mixture of two saves.

        Args:
            weights: files that are moved by name: other hosts wrote them, and this one's listing of the folder may be
                older.
            stale: files to remove before, whether they are there or not.

        Returns:
            what was moved, relative to the directory.

        Raises:
            OSError: nothing in the directory was touched.
            TensorParallelError: halfway, saying where the rest is.
        """
        if os.fstat(self._held).st_nlink == 0:
            raise OSError(f"somebody removed {self.path.name} while it was written")
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
    """Remove folders that killed jobs left, as far as it goes."""
    for left in directory.glob(f"{mark}*"):
        if not re.fullmatch(re.escape(mark) + "[0-9a-f]{8}", left.name):
            continue
        try:
            held = os.open(left, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            if _locked(held):
                shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(held)


def _locked(handle: int) -> bool:
    """Whether nobody else has locked it; False where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
