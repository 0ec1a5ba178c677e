"""Exports that go through DeepSpeed's engine write the full model.

Without our layers AutoTP would find nothing to gather, and ``save_16bit_model`` would write rank 0's shard.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.contract import Patches, contract
from tp_plugin.sharding import state_of
from tp_plugin.weights import full_state_dict

_CONSOLIDATE = ("_consolidated_16bit_state_dict", "_zero3_consolidated_16bit_state_dict")


def install(patches: Patches) -> None:
    """Lay the patches; engines whose model we did not shard keep DeepSpeed's own export."""
    for name in _CONSOLIDATE:
        patches.replace(DeepSpeedEngine, name, _full)
    patches.replace(DeepSpeedEngine, "save_16bit_model", _refused)


def check_contracts() -> None:
    """See :func:`tp_plugin.integrations.deepspeed.slot.check_contracts`."""
    why = "exports of a sharded model go through it"
    for name in _CONSOLIDATE:
        contract(DeepSpeedEngine, name, ["exclude_frozen_parameters"], why)
    contract(DeepSpeedEngine, "save_16bit_model", ["save_dir", "save_filename", "exclude_frozen_parameters"], why)


def _full(original: Callable[..., Any]) -> Callable[..., Any]:
    def consolidated(self: DeepSpeedEngine, exclude_frozen_parameters: bool = False) -> Any:
        if state_of(self.module) is None:
            return original(self, exclude_frozen_parameters)
        return full_state_dict(self, trainable_only=exclude_frozen_parameters)

    return consolidated


def _refused(original: Callable[..., Any]) -> Callable[..., Any]:
    def save_16bit_model(self: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
        if state_of(self.module) is None:
            return original(self, *args, **kwargs)
        raise TensorParallelError(
            "save_16bit_model would write one rank's shard, as a pickle; use "
            "tp_plugin.save_pretrained(engine, directory), which writes the full model as safetensors."
        )

    return save_16bit_model
