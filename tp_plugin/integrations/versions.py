"""Versions of other libraries: tested ones, installed ones, and names that have moved in a new one."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from typing import Any

from packaging.version import InvalidVersion, Version

from tp_plugin.errors import TensorParallelError

TESTED = {
    "torch": ("2.9", "2.13", "2.14"),
    "deepspeed": ("0.18.4", "0.18.9", "0.19.6", "0.19.8"),
    "accelerate": ("1.11", "1.13", "1.15"),
    "transformers": ("5.6", "5.8", "5.15", "5.16", "5.19", "5.20", "5.23", "5.24"),
    "peft": ("0.18", "0.20", "0.21"),
    "trl": ("0.24", "0.29", "1.9", "1.14", "1.16"),
}
"""Versions that tests ran with, by library: all of them with those of constraints.txt, a sample with the sets of
tests/versions/sets.toml. "5.23" stands for 5.23.0, 5.23.1 and so on."""

WHOLE = {
    "torch": "2.13",
    "deepspeed": "0.19.8",
    "accelerate": "1.15",
    "transformers": "5.23",
    "peft": "0.21",
    "trl": "1.16",
    "sentence_transformers": "6.2",
    "axolotl": "0.19",
}
"""A version of each library with which no feature is lost: that of constraints.txt, or a program's that was run."""


@functools.cache  # reading it takes 10 ms
def installed(library: str) -> str | None:
    """Version of an installed library; None if it is not installed."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_before(library: str, version: str) -> bool:
    """Return True if an older version of a library is installed."""
    found = installed(library)
    return found is not None and Version(found) < Version(version)


def is_tested(library: str, version: str) -> bool:
    """Return True if tests ran with ``version`` of ``library``."""
    try:
        release = Version(version)
    except InvalidVersion:
        return False
    known = (Version(one).release for one in TESTED[library])
    return not release.is_prerelease and any(release.release[: len(one)] == one for one in known)


def untested() -> dict[str, str]:
    """Installed versions, by library, of which no test ran."""
    found = {library: installed(library) for library in TESTED}
    return {library: version for library, version in found.items() if version and not is_tested(library, version)}


def named(library: str) -> str:
    """A library and its installed version, for messages."""
    return f"{library} {installed(library) or '(unknown version)'}"


MOVED: dict[tuple[Any, str], tuple[Any, str]] = {}


def moved_name(owner: Any, old: str, new: str, to: Any = None) -> None:
    """Say that a library has renamed or moved an attribute that tp_plugin relies on; call it before ``register``.

    ``owner.old`` becomes another name of the attribute. Where tp_plugin replaces it, both names get the replacement.

    Args:
        owner: the module or class that had the attribute.
        old: its name there.
        new: its name now.
        to: the module or class that has it now; None: ``owner`` still.

    Raises:
        TensorParallelError: ``owner`` has ``old`` still, or there is no attribute of the new name.
    """
    place = owner if to is None else to
    if hasattr(owner, old) or not hasattr(place, new):
        raise TensorParallelError(
            f"moved_name: {owner.__name__}.{old} is {'still' if hasattr(owner, old) else 'not'} there, and "
            f"{place.__name__}.{new} is {'there' if hasattr(place, new) else 'not'}; name an attribute that has moved."
        )
    setattr(owner, old, inspect.getattr_static(place, new))
    MOVED[owner, old] = place, new
