"""The random generators that a forward may draw from: torch's, NumPy's and Python's, their states as tensors.

Dropout draws from torch's. SpecAugment, BigBird and the LayerDrop of some models draw from NumPy's, the LayerDrop of
others from Python's.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping

import numpy
import torch

from tp_plugin.layers.dropout import default_generator

_ROOM = 16 + 8 * 640  # bytes for a Mersenne twister: 624 words, a position, two flags and a number
TORCH, TORCH_CPU, NUMPY, PYTHON = KINDS = ("torch's", "torch's for the CPU", "NumPy's", "Python's")
"""The first is that of the model's device, which may be the CPU."""


def host_states() -> dict[str, torch.Tensor]:
    """States of Python's and NumPy's default generators; without NumPy's if a script replaced it by another kind."""
    version, words, gauss = random.getstate()
    found = {
        "python": torch.tensor([version, *words]),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
    }
    state = numpy.random.get_state(legacy=False)
    if state["bit_generator"] == "MT19937":
        key, position = state["state"]["key"], state["state"]["pos"]
        found["numpy"] = torch.tensor([*key.tolist(), position, state["has_gauss"]])
        found["numpy.gauss"] = torch.tensor([state["gauss"]], dtype=torch.float64)
    return found


def set_host_states(read: Callable[[str], torch.Tensor | None]) -> None:
    """Restore states of :func:`host_states`; ``read(name)`` returns one, or None to leave the generator."""
    own, gauss = read("python"), read("python.gauss")
    if own is not None and gauss is not None:
        version, *words = own.tolist()
        (cached,) = gauss.tolist() or (None,)
        random.setstate((version, tuple(words), cached))
    own, gauss = read("numpy"), read("numpy.gauss")
    if own is not None and gauss is not None:
        *key, position, has_gauss = own.tolist()
        numpy.random.set_state(("MT19937", numpy.array(key, dtype=numpy.uint32), position, has_gauss, gauss.item()))


def states(device: torch.device) -> dict[str, torch.Tensor]:
    """One of :data:`KINDS` -> its default generator's state, as bytes (uint8, 1-dim, of fixed size, on the CPU)."""
    host, empty = host_states(), torch.tensor([], dtype=torch.float64)
    python, numpys = ([host.get(name, empty), host.get(f"{name}.gauss", empty)] for name in ("python", "numpy"))
    return {
        TORCH: default_generator(_of_torch(device)).get_state(),
        TORCH_CPU: torch.get_rng_state(),
        NUMPY: _padded(numpys),
        PYTHON: _padded(python),
    }


def set_states(device: torch.device, found: Mapping[str, torch.Tensor]) -> None:
    """Restore states of :func:`states`."""
    default_generator(_of_torch(device)).set_state(found[TORCH].clone())
    torch.set_rng_state(found[TORCH_CPU].clone())
    parts = {"numpy": found[NUMPY], "python": found[PYTHON]}
    read: dict[str, torch.Tensor] = {}
    for name, part in parts.items():
        words, gauss = (int(size) for size in part[:16].clone().view(torch.int64))
        if words:
            read[name] = part[16 : 16 + words].clone().view(torch.int64)
            read[f"{name}.gauss"] = part[16 + words : 16 + words + gauss].clone().view(torch.float64)
    set_host_states(read.get)


@contextlib.contextmanager
def same_draws(device: torch.device) -> Iterator[None]:
    """Restore the states of all generators on leaving."""
    before = states(device)
    try:
        yield
    finally:
        set_states(device, before)


def seed_all(seed: int) -> None:
    """Seed torch's, NumPy's and Python's generators."""
    torch.manual_seed(seed)
    numpy.random.seed(seed % 2**32)
    random.seed(seed)


def _padded(parts: list[torch.Tensor]) -> torch.Tensor:
    """Sizes of two tensors in bytes, the tensors, and zeros."""
    raw = [part.view(torch.uint8) for part in parts]
    sizes = torch.tensor([len(part) for part in raw]).view(torch.uint8)
    joined = torch.cat([sizes, *raw])
    return torch.nn.functional.pad(joined, (0, _ROOM - len(joined)))


def _of_torch(device: torch.device) -> torch.device:
    """Device of the generator that a model on ``device`` draws from; nothing is drawn on meta."""
    return torch.device("cpu") if device.type == "meta" else device
