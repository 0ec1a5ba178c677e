"""Random states after a change of shape, which ``load_state`` takes by the number of a process.

That number is another data-parallel rank's then; what the engine's checkpoint gave each is put back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator

from tp_plugin.integrations.contract import Patches, contract
from tp_plugin.weights.gather import unwrapped
from tp_plugin.weights.randomness import forget, restore_again


def check_contracts() -> None:
    why = "random states of another shape are set after it"
    contract(Accelerator, "load_state", ["input_dir", "load_kwargs"], why)


def install(patches: Patches) -> None:
    patches.replace(Accelerator, "load_state", _load_state_method)


def _load_state_method(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_state(self: Accelerator, *args: Any, **kwargs: Any) -> Any:
        models = [unwrapped(model) for model in self._models]
        for model in models:
            forget(model)  # of a load before this one
        found = original(self, *args, **kwargs)
        for model in models:
            restore_again(model)
        return found

    return load_state
