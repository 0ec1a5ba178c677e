"""transformers under our slot: models loaded by slices, the guarded first step, streamed saves, ``generate``.

What Trainer counts and reads is counted and read once a TP group.
"""

from tp_plugin.integrations.contract import Patches
from tp_plugin.integrations.transformers import (
    export,
    files,
    first_step,
    generate,
    loading,
    parameters,
    push,
    randomness,
    rates,
    reading,
    record,
    refuse,
    tokens,
)

_PATCHES = Patches()
_PARTS = (loading, first_step, export, generate, parameters, push, randomness, rates, reading, record, refuse, tokens)


def install() -> None:
    """Lay our patches on transformers; calling it again does nothing. Raises TensorParallelError if a name moved."""
    if _PATCHES:
        return
    check_contracts()
    for part in _PARTS:
        part.install(_PATCHES)


def uninstall() -> None:
    """Take them off again."""
    _PATCHES.undo()


def check_contracts() -> None:
    """Every name this package touches, checked. Raises TensorParallelError naming what moved."""
    for part in (*_PARTS, files):
        part.check_contracts()


__all__ = ["check_contracts", "install", "uninstall"]
