"""Set-ups of ``Accelerator`` that would train replicated or wrongly, refused on every rank before training.

And one refused when it comes to it: ``find_executable_batch_size`` on a rank that has run out of memory, by itself.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, memory

from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.accelerate.degree import degree_in, tp_size, tp_size_of_launch, uses_deepspeed
from tp_plugin.integrations.contract import Patches, contract


def check_contracts() -> None:
    why = "a tp_size that DeepSpeed does not see, and a DeepSpeed that is dropped, are refused there"
    signature = inspect.signature(contract(Accelerator, "__init__", None, why)).parameters
    for name in ("cpu", "deepspeed_plugin", "deepspeed_plugins", "parallelism_config", "torch_tp_plugin"):
        if name not in signature:
            raise TensorParallelError(
                f"accelerate.Accelerator has lost its argument {name!r}; tp_plugin needs it: {why}."
            )
    why = "find_executable_batch_size is refused there"
    contract(memory, "should_reduce_batch_size", ["exception"], why)


def install(patches: Patches) -> None:
    patches.replace(Accelerator, "__init__", _init_method)
    patches.replace(memory, "should_reduce_batch_size", _should_reduce_batch_size_function)


def _init_method(original: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs).arguments
        plugins = given.get("deepspeed_plugin") or given.get("deepspeed_plugins")
        if uses_deepspeed() or plugins:
            refuse_parallelism_config(given.get("parallelism_config") or given.get("torch_tp_plugin"))
        wanted = _degree_wanted(plugins)
        original(self, *args, **kwargs)
        if wanted > 1 and self.distributed_type != DistributedType.DEEPSPEED:
            raise TensorParallelError(
                f"tensor_parallel.autotp_size is {wanted} but accelerate has dropped DeepSpeed for "
                f"{self.distributed_type.value}, and nothing would be sharded: remove cpu=True (Accelerator), "
                "use_cpu=True (TrainingArguments) or ACCELERATE_USE_CPU; a machine without accelerator needs none."
            )

    return __init__


def refuse_parallelism_config(given: Any) -> None:
    """Raise if a ParallelismConfig, or the environment it reads, asks for tensor parallelism beside DeepSpeed."""
    size = getattr(given, "tp_size", None)
    if given is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        size = int(os.environ.get("PARALLELISM_CONFIG_TP_SIZE", "1"))
    if size is not None and size > 1:
        raise TensorParallelError(
            f"tp_size={size} of accelerate's ParallelismConfig (parallelism_config_tp_size, PARALLELISM_CONFIG_TP_SIZE)"
            " is not seen by DeepSpeed, which would train every rank on a full replica: remove it and set "
            f'"tensor_parallel": {{"autotp_size": {size}}} in the DeepSpeed config.'
        )


def _degree_wanted(plugins: Any) -> int:
    found = plugins.values() if isinstance(plugins, dict) else [plugins] if plugins else []
    return max([tp_size_of_launch(), *(degree_in(plugin.deepspeed_config) for plugin in found)])


def _should_reduce_batch_size_function(original: Callable[[Exception], bool]) -> Callable[[Exception], bool]:
    """``find_executable_batch_size`` itself is imported by name, often before us; this it asks about every failure."""

    @functools.wraps(original)
    def should_reduce_batch_size(exception: Exception) -> bool:
        again = original(exception)
        if again and tp_size() > 1:
            raise TensorParallelError(
                "find_executable_batch_size would have this rank, out of memory, try again by itself, while the others "
                "of its tensor-parallel group wait for it; give a batch size that fits."
            ) from exception
        return again

    return should_reduce_batch_size
