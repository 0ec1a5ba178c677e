"""Trainer's TP degree is that of what it counts: 1, as accelerate counts a TP group once under our slot.

Trainer divides by ``get_tp_size()`` what ``Accelerator.gather`` and ``num_processes`` used to repeat for every TP rank:
``num_items_in_batch``, by which the loss is divided, and the factor that data parallelism averages away again. Nothing
is repeated here; and the token count of one rank, without ``average_tokens_across_devices``, never was. Only
``get_total_train_batch_size`` divides the world by it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from transformers import Trainer, TrainingArguments

from tp_plugin.integrations.accelerate.degree import tp_size
from tp_plugin.integrations.contract import Patches, contract


def check_contracts() -> None:
    why = "it says how often a token is counted"
    contract(Trainer, "get_tp_size", [], why)
    contract(Trainer, "get_total_train_batch_size", ["args"], "it divides the world by the TP degree")


def install(patches: Patches) -> None:
    patches.replace(Trainer, "get_tp_size", _get_tp_size_method)
    patches.replace(Trainer, "get_total_train_batch_size", _get_total_train_batch_size_method)


def _get_tp_size_method(original: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(original)
    def get_tp_size(self: Trainer) -> int:
        return 1 if tp_size() > 1 else original(self)

    return get_tp_size


def _get_total_train_batch_size_method(original: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(original)
    def get_total_train_batch_size(self: Trainer, args: TrainingArguments) -> int:
        return original(self, args) // tp_size()

    return get_total_train_batch_size
