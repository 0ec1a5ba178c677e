"""Options of ``Accelerator`` that would train replicated or wrongly, refused on every rank before training.

``find_executable_batch_size`` is refused later: when a rank runs out of memory and would retry alone.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, dataclasses, memory
from accelerate.utils.deepspeed import HfDeepSpeedConfig

from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.accelerate.degree import degree_in, tp_size, tp_size_of_launch, uses_deepspeed
from tp_plugin.integrations.contract import NameMoved
from tp_plugin.integrations.environment import refuse_no_degree, with_degree
from tp_plugin.integrations.features import ACCELERATE
from tp_plugin.integrations.upstream import Upstream

upstream = Upstream(ACCELERATE)
_DROPPED = "a tp_size that DeepSpeed does not see, and a DeepSpeed that is dropped, are refused there"
TRIPWIRE = "tp_plugin.register()"


@upstream.also
def _check_arguments() -> None:
    signature = inspect.signature(Accelerator.__init__).parameters
    for name in ("cpu", "deepspeed_plugin", "deepspeed_plugins", "parallelism_config", "torch_tp_plugin"):
        if name not in signature:
            raise NameMoved(f"accelerate.Accelerator takes no {name!r} ({_DROPPED})")


@upstream.patch(Accelerator, "__init__", None, _DROPPED)
def _init(original: Callable[..., None], self: Accelerator, *args: Any, **kwargs: Any) -> None:
    given = inspect.signature(original).bind(self, *args, **kwargs).arguments
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
    plugin = getattr(self.state, "deepspeed_plugin", None)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    refuse_no_degree(None if plugin is None else plugin.deepspeed_config, world)


@upstream.patch(HfDeepSpeedConfig, "__init__", ["config_file_or_dict"], "TP_PLUGIN_DEGREE is put into configs there")
def _read_config(original: Callable[..., None], self: Any, config_file_or_dict: Any) -> None:
    original(self, config_file_or_dict)
    self.config = with_degree(self.config)  # a copy of the caller's


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


@upstream.patch(memory, "should_reduce_batch_size", ["exception"], "find_executable_batch_size is refused there")
def _should_reduce_batch_size(original: Callable[[Exception], bool], exception: Exception) -> bool:
    """``find_executable_batch_size``, which scripts often import before us, asks this function about every failure."""
    again = original(exception)
    if again and tp_size() > 1:
        raise TensorParallelError(
            "find_executable_batch_size would let this rank, which is out of memory, retry alone while its "
            "tensor-parallel group waits; give a batch size that fits."
        ) from exception
    return again


@upstream.patch(dataclasses, "str_to_bool", ["value", "to_bool"], "zero3_init_flag of our recipes is read by it")
def _str_to_bool(original: Callable[..., Any], value: str, to_bool: bool = False) -> Any:
    """Read the tripwire of our recipes' accelerate configs, ``zero3_init_flag: tp_plugin.register()``, as false.

    Without us accelerate raises a ValueError that quotes it when it reads the config. On a machine without accelerator
    that is before its data loaders fail. At ZeRO-3 a model is sharded first, so the flag changes nothing.
    """
    return original("false" if TRIPWIRE in value else value, to_bool)
