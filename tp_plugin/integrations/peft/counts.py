"""``print_trainable_parameters()`` and what it asks count the whole model's parameters, not this rank's shards."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from peft import PeftModel

from tp_plugin.integrations.contract import Patches, contract
from tp_plugin.integrations.transformers.parameters import whole_count


def check_contracts() -> None:
    contract(PeftModel, "get_nb_trainable_parameters", [], "it would count this rank's shards")


def install(patches: Patches) -> None:
    patches.replace(PeftModel, "get_nb_trainable_parameters", _get_nb_trainable_parameters_method)


def _get_nb_trainable_parameters_method(original: Callable[..., tuple[int, int]]) -> Callable[..., tuple[int, int]]:
    @functools.wraps(original)
    def get_nb_trainable_parameters(self: Any) -> tuple[int, int]:  # PEFT also calls it with models of its tuners
        trainable, every = (whole_count(self, trainable=only) for only in (True, False))
        return original(self) if trainable is None or every is None else (trainable, every)

    return get_nb_trainable_parameters
