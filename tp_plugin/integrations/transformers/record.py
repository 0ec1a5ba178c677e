"""``deepspeed.tp_model_init``, which Trainer calls for every ``train()``, leaves no trace in the process.

It records degree and dtype globally: a second Trainer with another dtype would be refused, and a later engine without
``tensor_parallel`` in its config (a reference model) sharded nevertheless. The config says all that our slot needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import deepspeed
from transformers.integrations import deepspeed as trainer_side

from tp_plugin.integrations.accelerate.degree import degree_in
from tp_plugin.integrations.contract import Patches, contract


def check_contracts() -> None:
    contract(
        deepspeed, "tp_model_init", ["model", "tp_size", "dtype", "config"], "Trainer calls it to record the degree"
    )
    contract(trainer_side, "deepspeed_init", ["trainer", "num_training_steps", "inference"], "it calls tp_model_init")


def install(patches: Patches) -> None:
    patches.replace(deepspeed, "tp_model_init", _tp_model_init_function)


def _tp_model_init_function(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def tp_model_init(model: Any, tp_size: int, dtype: Any, config: Any = None, **kwargs: Any) -> Any:
        if tp_size > 1 and tp_size == degree_in(config) and not kwargs:
            return model
        return original(model, tp_size, dtype, config, **kwargs)

    return tp_model_init
