"""Options of ``TrainingArguments`` that would go wrong on a sharded model, refused on every rank before that."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers import trainer

from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.accelerate.degree import tp_size
from tp_plugin.integrations.contract import Patches, contract

LIGER = (
    "use_liger_kernel=True replaces forwards of layers that tensor parallelism shards; leave it off, the loss of a "
    "sharded head is fused already."
)
FINDING = (
    "auto_find_batch_size=True lets a rank that runs out of memory try again by itself, while the others of its "
    "tensor-parallel group wait for it; give a batch size that fits."
)


def check_contracts() -> None:
    contract(trainer, "apply_liger_kernel", ["model", "kernel_config"], "it is refused there")
    sizes = ["function", "starting_batch_size", "auto_find_batch_size"]
    contract(trainer, "find_executable_batch_size", sizes, "auto_find_batch_size is refused there")


def install(patches: Patches) -> None:
    patches.replace(trainer, "apply_liger_kernel", lambda original: _refusing(original, LIGER, lambda *_: True))
    patches.replace(trainer, "find_executable_batch_size", lambda original: _refusing(original, FINDING, _finds))


def _finds(_function: Any = None, _start: int = 0, auto_find_batch_size: bool = False) -> bool:
    return auto_find_batch_size


def _refusing(original: Callable[..., Any], why: str, asked: Callable[..., bool]) -> Callable[..., Any]:
    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        if tp_size() > 1 and asked(*args, **kwargs):
            raise TensorParallelError(why)
        return original(*args, **kwargs)

    return function
