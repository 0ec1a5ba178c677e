"""Files for a directory that holds others too: written aside in it by one process, then moved to their places.

A directory that is ours alone is written as :mod:`tp_plugin.weights.atomic` does, whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from tp_plugin.weights.atomic import sync

MARK = ".saving-"
"""Begins the names of the folders that are written into."""
_CONFIGS = ("adapter_config.json", "config.json")  # without one nobody loads what lies beside


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A new folder in ``directory``, which is made if it is missing; it is removed with whatever is left in it.

    So are those of jobs that were killed while they saved. Raises OSError.
    """
    for left in directory.glob(f"{MARK}*"):
        if re.fullmatch(re.escape(MARK) + "[0-9a-f]{8}", left.name):
            shutil.rmtree(left, ignore_errors=True)
    staging = directory / f"{MARK}{secrets.token_hex(4)}"
    try:
        staging.mkdir(parents=True)
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def move_in(staging: Path, directory: Path, weights: Collection[str] = (), stale: Collection[Path] = ()) -> list[str]:
    """Move what was written into ``directory``: weights first, configs last, once all of it is on the disk.

    Args:
        weights: files that are moved by name: other hosts wrote them, and this one's listing of the folder may be
            older.
        stale: files that go between, in this order, whether they are there or not.

    Returns:
        what was moved, relative to ``directory``.

    Raises:
        OSError: one of them is missing; nothing in ``directory`` was touched. Or whatever the disk refused.
    """
    listed = {path.relative_to(staging) for path in staging.rglob("*") if path.is_file()}
    fresh = sorted(listed | {Path(name) for name in weights})
    for path in fresh:
        sync(staging / path)
    for old in stale:
        old.unlink(missing_ok=True)
    for path in sorted(fresh, key=lambda path: (path.name in _CONFIGS, path.suffix != ".safetensors")):
        target = directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / path, target)
    sync(directory)
    return [path.as_posix() for path in fresh]
