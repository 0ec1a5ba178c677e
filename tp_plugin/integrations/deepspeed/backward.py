"""``engine.backward`` is where a loop shows the loss it made, which no forward of the model's does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from tp_plugin.integrations.contract import Patches, contract
from tp_plugin.verify.first_step import guard_of


def check_contracts() -> None:
    """See :func:`tp_plugin.integrations.deepspeed.slot.check_contracts`."""
    contract(DeepSpeedEngine, "backward", ["loss"], "the first loss is compared over a tensor-parallel group")


def install(patches: Patches) -> None:
    """Lay the patch; engines whose model is not sharded go on as ever."""
    patches.replace(DeepSpeedEngine, "backward", _backward)


def _backward(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def backward(self: DeepSpeedEngine, loss: Any, *args: Any, **options: Any) -> Any:
        guard = guard_of(self.module)
        if guard is not None and guard.gradients is not None:  # the first step, or one that was asked for
            guard.gradients.compare_loss(loss, guard.mesh)
        return original(self, loss, *args, **options)

    return backward
