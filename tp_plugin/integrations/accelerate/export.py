"""``get_state_dict`` returns the full model, whatever the DeepSpeed config says about gathering on save.

Accelerate asks the engine to consolidate AutoTP's layers, or refuses without
``stage3_gather_16bit_weights_on_model_save``, even at ZeRO-1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator

from tp_plugin.integrations.contract import Patches, contract
from tp_plugin.sharding import state_of
from tp_plugin.weights import full_state_dict


def check_contracts() -> None:
    contract(Accelerator, "get_state_dict", ["model", "unwrap"], "it would return shards, or refuse")


def install(patches: Patches) -> None:
    patches.replace(Accelerator, "get_state_dict", _get_state_dict_method)


def _get_state_dict_method(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_state_dict(self: Accelerator, model: Any, unwrap: bool = True) -> Any:
        if state_of(model) is None:
            return original(self, model, unwrap)
        try:
            return full_state_dict(model)
        except ValueError as failure:
            # Trainer.save_model takes a ValueError for accelerate's refusal and goes on without writing weights
            raise RuntimeError(str(failure)) from failure

    return get_state_dict
