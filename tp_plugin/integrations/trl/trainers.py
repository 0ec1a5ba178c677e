"""TRL's trainers and their options: those tested on a sharded model are allowed, all others refused.

They are refused before a trainer's own ``__init__``, which loads models, prepares data and then calls
``_BaseTrainer``'s.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.accelerate.degree import degree_in, tp_size, tp_size_of_launch
from tp_plugin.integrations.features import TRL_TRAINERS
from tp_plugin.integrations.transformers.unsupported import refuse_arguments
from tp_plugin.integrations.upstream import Upstream

MODULE = "trl.trainer.base_trainer"
_REFUSES = "tp_refuses"
_REFUSED = "trainers that are not validated are refused there"
VALIDATED = {"trl.trainer.sft_trainer.SFTTrainer", "trl.trainer.dpo_trainer.DPOTrainer"} | {
    "trl.trainer.reward_trainer.RewardTrainer"
}
"""Trainers that tests compare with one process. A user's subclass of one of them counts as its base."""


def declare(base_trainer: ModuleType) -> Upstream:
    """The class of TRL that every trainer of its is a subclass of, and the ``__init__`` of those that exist."""
    upstream = Upstream(TRL_TRAINERS)
    made = "every trainer of TRL is made by its __init__"
    upstream.needs(base_trainer, "_BaseTrainer", None, made, since="1.0")
    upstream.needs(base_trainer, "BaseTrainer", None, made, until="1.0")
    base = getattr(base_trainer, "_BaseTrainer", getattr(base_trainer, "BaseTrainer", None))
    if base is None:
        return upstream
    for kind in (base, *_subclasses(base)):
        if "__init__" in vars(kind):
            upstream.replace(kind, "__init__", None, _REFUSED, _init_method)
    to_come = functools.partial(_of_those_to_come, base)
    upstream.replace(base, "__init_subclass__", None, "trainers that are defined later are refused, too", to_come)
    return upstream


def _of_those_to_come(base: type, original: Any) -> Any:
    """Refuse trainers that are defined later, too, while ``base`` refuses."""

    def __init_subclass__(cls: type, **kwargs: Any) -> None:
        original.__get__(None, cls)(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _init_method(cls.__init__, lambda: hasattr(base.__init__, _REFUSES))  # type: ignore[misc]

    return classmethod(__init_subclass__)


def _subclasses(kind: type) -> Iterator[type]:
    below: type
    for below in kind.__subclasses__():
        yield below
        yield from _subclasses(below)


def _init_method(original: Callable[..., None], refuses: Callable[[], bool] = lambda: True) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if refuses():
            given = (value for value in (*args, *kwargs.values()) if hasattr(value, "deepspeed_plugin"))
            refuse(type(self), next(given, None))
        original(self, *args, **kwargs)
        if refuses():
            refuse(type(self), self.args)  # in whichever argument they were

    setattr(__init__, _REFUSES, True)
    return __init__


def refuse(kind: type, args: Any) -> None:
    """Raise TensorParallelError on every rank for a trainer or an option that is not validated.

    Args:
        kind: the trainer's class.
        args: its ``TrainingArguments``, which know the DeepSpeed config; None where it makes them itself, from what the
            process was launched with.
    """
    plugin = getattr(args, "deepspeed_plugin", None)
    degree = max(tp_size(), tp_size_of_launch()) if args is None else 1
    if plugin is not None:
        degree = degree_in(plugin.deepspeed_config)
    if degree == 1:
        return
    name = known_as(kind)
    if name not in VALIDATED:
        validated = ", ".join(sorted(one.rpartition(".")[2] for one in VALIDATED))
        raise TensorParallelError(
            f"{name.rpartition('.')[2]} is not validated under tensor parallelism: of TRL's trainers use {validated}, "
            "or set tensor_parallel.autotp_size to 1."
        )
    if plugin is None:
        return
    refuse_arguments(args)
    if getattr(args, "sync_ref_model", False) and plugin.zero_stage == 3:
        raise TensorParallelError(
            "sync_ref_model=True at ZeRO stage 3 updates the reference on global rank 0 alone, which has one "
            "tensor-parallel shard of it; use ZeRO stage 2."
        )


def known_as(kind: type) -> str:
    """Return the full name of the trainer of TRL that ``kind`` is, or is a subclass of."""
    ours = next(one for one in kind.__mro__ if one.__module__.split(".")[0] == "trl")
    return f"{ours.__module__}.{ours.__qualname__}"
