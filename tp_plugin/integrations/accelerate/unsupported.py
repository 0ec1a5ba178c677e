"""Options of ``Accelerator`` that would train replicated or wrongly, refused on every rank before training.

``find_executable_batch_size`` is refused later: when a rank runs out of memory and would retry alone.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
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
_DROPPED = "a tp_size that DeepSpeed has not, and a DeepSpeed that is dropped, are refused there"
TRIPWIRE = "tp_plugin.register()"
_USED = "ACCELERATE_USE_PARALLELISM_CONFIG"


@upstream.also
def _check_arguments() -> None:
    signature = inspect.signature(Accelerator.__init__).parameters
    for name in ("cpu", "deepspeed_plugin", "deepspeed_plugins", "parallelism_config", "torch_tp_plugin"):
        if name not in signature:
            raise NameMoved(f"accelerate.Accelerator takes no {name!r} ({_DROPPED})")


@upstream.patch(Accelerator, "__init__", None, _DROPPED)
def _init(original: Callable[..., None], self: Accelerator, *args: Any, **kwargs: Any) -> None:
    bound = inspect.signature(original).bind(self, *args, **kwargs)
    plugins = bound.arguments.get("deepspeed_plugin") or bound.arguments.get("deepspeed_plugins")
    wanted = _degree_wanted(plugins)
    with _one_degree(bound.arguments, wanted) if uses_deepspeed() or plugins else contextlib.nullcontext():
        original(*bound.args, **bound.kwargs)
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


@contextlib.contextmanager
def _one_degree(arguments: dict[str, Any], degree: int) -> Iterator[None]:
    """While open, hide a ParallelismConfig, or the environment it reads, that asks for the engine's own ``degree``.

    Programs that offer one key for the degree hand it to DeepSpeed and to accelerate, whose device mesh would shard
    another time.

    Raises:
        TensorParallelError: it asks for another degree, or for parallelism over the sequence as well.
    """
    given = arguments.get("parallelism_config") or arguments.get("torch_tp_plugin")
    sizes = {name: _size_asked(given, name) for name in ("tp_size", "cp_size", "sp_size")}
    if sizes["tp_size"] == 1:
        yield
        return
    refuse_other_sizes(sizes, degree)
    for name in ("parallelism_config", "torch_tp_plugin"):
        arguments.pop(name, None)
    used = os.environ.pop(_USED, None)
    try:
        yield
    finally:
        if used is not None:
            os.environ[_USED] = used


def _size_asked(given: Any, name: str) -> int:
    if given is None and os.environ.get(_USED, "false").lower() == "true":
        return int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1"))
    return getattr(given, name, None) or 1


def refuse_other_sizes(sizes: Mapping[str, int], degree: int) -> None:
    """Raise if a ParallelismConfig does not ask for tensor parallelism of ``degree`` alone."""
    size = sizes["tp_size"]
    if size != degree:
        has = "no degree" if degree == 1 else f"the degree {degree}"
        raise TensorParallelError(
            f"tp_size={size} of accelerate's ParallelismConfig (parallelism_config_tp_size, PARALLELISM_CONFIG_TP_SIZE)"
            f" is not seen by DeepSpeed, whose config has {has}: remove it, or set "
            f'"tensor_parallel": {{"autotp_size": {size}}} in the DeepSpeed config.'
        )
    other = next((name for name, value in sizes.items() if value > 1 and name != "tp_size"), None)
    if other is not None:
        raise TensorParallelError(
            f"{other}={sizes[other]} of accelerate's ParallelismConfig cannot be had beside tensor parallelism of "
            f"tp_plugin; remove it (parallelism_config_{other}, PARALLELISM_CONFIG_{other.upper()})."
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
