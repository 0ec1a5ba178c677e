"""The state of a process's random generators as tensors, and back."""

from __future__ import annotations

import random
import weakref
from pathlib import Path

import numpy
import torch

_PREFIX = "rng|"
_RESTORED: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Path, dict[str, torch.Tensor]]] = (
    weakref.WeakKeyDictionary()
)


def generators() -> dict[str, torch.Tensor]:
    """The states of Python's, NumPy's and torch's default generators, the current CUDA device's among them."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    found = {
        "python": torch.tensor([version, *words]),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss]),  # type: ignore[union-attr]
        "numpy.gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return {_PREFIX + name: state for name, state in found.items()}


def set_generators(read) -> None:  # type: ignore[no-untyped-def]
    """Put all generators into a state of :func:`generators`; ``read(key)`` gives its tensors, or None."""
    version, *words = read(f"{_PREFIX}python").tolist()
    gauss = read(f"{_PREFIX}python.gauss").tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    *keys, position, has_gauss = read(f"{_PREFIX}numpy").tolist()
    cached = read(f"{_PREFIX}numpy.gauss").item()
    numpy.random.set_state(("MT19937", numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(read(f"{_PREFIX}torch"))
    device = read(f"{_PREFIX}cuda")
    if device is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(device)


def part_ways(number: int) -> None:
    """Move the torch, NumPy and Python generators to a state of their own, derived from the present one and ``number``.

    For a rank that the checkpoint has no state of: it takes another's and parts from it.
    """
    seed = int(torch.randint(2**31, ()).item()) + 1000003 * number
    torch.manual_seed(seed)
    numpy.random.seed(seed % 2**32)
    random.seed(seed)


def remember(model: torch.nn.Module, directory: Path) -> None:
    """The present states are what ``model`` has from the checkpoint ``directory``, which is of another shape.

    Trainer and Accelerate keep states by the number of a process. In another shape that number is another rank's, so
    what they put in afterwards is undone by :func:`restore_again`.
    """
    _RESTORED[model] = directory, generators()


def forget(model: torch.nn.Module) -> None:
    """There is nothing that :func:`restore_again` should restore."""
    _RESTORED.pop(model, None)


def restore_again(model: torch.nn.Module, folder: Path | None = None) -> None:
    """Put the generators into the states that were remembered, if of a checkpoint in ``folder`` (None: any)."""
    directory, states = _RESTORED.get(model, (None, {}))
    if directory is not None and (folder is None or directory.parent.resolve() == folder.resolve()):
        set_generators(states.get)
