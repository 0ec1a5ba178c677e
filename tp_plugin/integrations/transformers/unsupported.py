"""Options that are wrong on a sharded model, refused on every rank when a Trainer is made.

They are those of ``TrainingArguments`` and of the DeepSpeed config. The engine refuses what only it knows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel, Trainer, trainer

from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.accelerate.degree import degree_in, tp_size
from tp_plugin.integrations.deepspeed.unsupported import refuse_config
from tp_plugin.integrations.features import TRAINER
from tp_plugin.integrations.upstream import Upstream

upstream = Upstream(TRAINER)
_DEGREE, _MESH = "_tp_size", "_device_mesh"
_MARKED = "programs mark a model by it; Trainer would prepare no engine then"
upstream.needs(PreTrainedModel, _DEGREE, None, _MARKED)
upstream.needs(PreTrainedModel, _MESH, None, _MARKED, since="5.15")

LIGER = (
    "use_liger_kernel=True replaces forwards of layers that tensor parallelism shards; leave it off (the loss of a "
    "sharded head is fused already)."
)
FINDING = (
    "auto_find_batch_size=True lets a rank that runs out of memory retry alone while its tensor-parallel group waits; "
    "give a batch size that fits."
)


def refuse_arguments(args: Any) -> None:
    """Raise TensorParallelError on every rank for options in a run's ``TrainingArguments``."""
    if _degree_of(args) == 1:
        return
    for option, why in (("use_liger_kernel", LIGER), ("auto_find_batch_size", FINDING)):
        if getattr(args, option, False):
            raise TensorParallelError(why)
    refuse_config(args.deepspeed_plugin.deepspeed_config, _degree_of(args))


def _degree_of(args: Any) -> int:
    plugin = getattr(args, "deepspeed_plugin", None)
    return 1 if plugin is None else degree_in(plugin.deepspeed_config)


@upstream.patch(Trainer, "__init__", ["model", "args"], "options are refused there")
def _init(
    original: Callable[..., None], self: Trainer, model: Any = None, args: Any = None, *more: Any, **options: Any
) -> None:
    refuse_arguments(args)
    if getattr(model, _DEGREE, None) == _degree_of(args) > 1:
        setattr(model, _DEGREE, None)  # the engine's degree, which other keys of the program gave, too
        setattr(model, _MESH, None)
    original(self, model, args, *more, **options)


@upstream.patch(trainer, "apply_liger_kernel", ["model", "kernel_config"], "it is refused there")
def _apply_liger_kernel(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if tp_size() > 1:
        raise TensorParallelError(LIGER)
    return original(*args, **kwargs)


_SIZES = ["function", "starting_batch_size", "auto_find_batch_size"]


@upstream.patch(trainer, "find_executable_batch_size", _SIZES, "auto_find_batch_size is refused there")
def _find_executable_batch_size(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    if tp_size() > 1 and given.get("auto_find_batch_size"):
        raise TensorParallelError(FINDING)
    return original(*args, **kwargs)
