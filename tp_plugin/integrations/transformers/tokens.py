"""``num_items_in_batch``, by which Trainer divides the loss, counts the tokens of each sample once.

Trainer divides its count by tp because ``Accelerator.gather`` used to repeat every TP rank. Without
``average_tokens_across_devices`` nothing was repeated, and loss and gradient norm came out tp times too large; with it,
our ``gather`` repeats nothing either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer

from tp_plugin.integrations.accelerate.degree import tp_size
from tp_plugin.integrations.contract import Patches, contract


def check_contracts() -> None:
    why = "it divides the token count by the TP degree"
    contract(Trainer, "_get_num_items_in_batch", ["batch_samples", "device"], why)
    contract(Trainer, "get_tp_size", [], why)


def install(patches: Patches) -> None:
    patches.replace(Trainer, "_get_num_items_in_batch", _get_num_items_in_batch_method)


def _get_num_items_in_batch_method(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _get_num_items_in_batch(self: Trainer, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        count = original(self, batch_samples, device)
        degree = tp_size()
        if degree > 1 and torch.is_tensor(count):
            return (count * degree).round()  # a whole number again, also for a degree that is no power of two
        return count

    return _get_num_items_in_batch
