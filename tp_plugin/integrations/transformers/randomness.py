"""Random states after a change of shape, which Trainer files under the number of a process.

From tp 2 x dp 2 to tp 1 x dp 4, process 1 would get what (dp 0, tp 1) had: the masks of its neighbour, process 0. What
the engine's checkpoint gave each data-parallel rank is put back. On the same shape Trainer's files are right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from transformers import Trainer

from tp_plugin.integrations.contract import Patches, contract
from tp_plugin.weights.gather import unwrapped
from tp_plugin.weights.randomness import restore_again


def check_contracts() -> None:
    contract(Trainer, "_load_rng_state", ["checkpoint"], "random states of another shape are set after it")


def install(patches: Patches) -> None:
    patches.replace(Trainer, "_load_rng_state", _load_rng_state_method)


def _load_rng_state_method(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def _load_rng_state(self: Trainer, checkpoint: str | None) -> None:
        original(self, checkpoint)
        if checkpoint is not None:
            restore_again(unwrapped(self.model), Path(checkpoint))

    return _load_rng_state
