"""States of a process's random generators, read and set as tensors."""

from __future__ import annotations

import weakref
from pathlib import Path

import torch

from tp_plugin.layers.generators import host_states, seed_all, set_host_states

_PREFIX = "rng|"
_RESTORED: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Path, dict[str, torch.Tensor]]] = (
    weakref.WeakKeyDictionary()
)


def generators() -> dict[str, torch.Tensor]:
    """States of the default generators of Python, NumPy, torch and the current CUDA device."""
    found = host_states() | {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return {_PREFIX + name: state for name, state in found.items()}


def set_generators(read) -> None:  # type: ignore[no-untyped-def]
    """Set all generators to a state of :func:`generators`; ``read(key)`` returns its tensors, or None."""
    set_host_states(lambda name: read(_PREFIX + name))
    torch.set_rng_state(read(f"{_PREFIX}torch"))
    device = read(f"{_PREFIX}cuda")
    if device is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(device)


def reseed(number: int) -> None:
    """Reseed the torch, NumPy and Python generators from their present state and ``number``.

    A data-parallel rank that the checkpoint has no state of loads another rank's and reseeds from it.
    """
    seed = int(torch.randint(2**31, ()).item()) + 1000003 * number
    seed_all(seed)


def remember(model: torch.nn.Module, directory: Path) -> None:
    """Record the present states as those of ``model`` from the checkpoint ``directory``, of another topology.

    Trainer and Accelerate store states by process number. At another topology that number is another rank's, so
    :func:`restore_again` undoes what they load afterwards.
    """
    _RESTORED[model] = directory, generators()


def forget(model: torch.nn.Module) -> None:
    """Delete the record of ``model`` for :func:`restore_again`."""
    _RESTORED.pop(model, None)


def restore_again(model: torch.nn.Module, folder: Path | None = None) -> None:
    """Set the generators to the recorded states if they are of a checkpoint in ``folder`` (None: any)."""
    directory, states = _RESTORED.get(model, (None, {}))
    if directory is not None and (folder is None or directory.parent.resolve() == folder.resolve()):
        set_generators(states.get)
