"""Which of TRL's trainers, with which options, were shown to be right on a sharded model; all others are refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.accelerate.degree import degree_in
from tp_plugin.integrations.contract import Patches, contract

MODULE = "trl.trainer.base_trainer"
SHOWN = {"trl.trainer.sft_trainer.SFTTrainer", "trl.trainer.dpo_trainer.DPOTrainer"} | {
    "trl.trainer.reward_trainer.RewardTrainer"
}
"""Trainers that tests compare with one process. A user's subclass of one of them is taken for its base."""


def check_contracts(base_trainer: ModuleType) -> None:
    kind = contract(base_trainer, "_BaseTrainer", None, "every trainer of TRL is made by its __init__")
    contract(kind, "__init__", None, "trainers that were not shown right are refused there")


def install(patches: Patches, base_trainer: ModuleType) -> None:
    patches.replace(base_trainer._BaseTrainer, "__init__", _init_method)


def _init_method(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        refuse(type(self), kwargs.get("args"))
        original(self, *args, **kwargs)
        refuse(type(self), self.args)  # however it was given them

    return __init__


def refuse(kind: type, args: Any) -> None:
    """Raise TensorParallelError, on every rank alike, for a trainer or an option that was not shown to be right.

    Args:
        kind: the trainer's class.
        args: its ``TrainingArguments``, which know the DeepSpeed config; None is taken for a run without it.
    """
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is None or degree_in(plugin.deepspeed_config) == 1:
        return
    name = known_as(kind)
    if name not in SHOWN:
        shown = ", ".join(sorted(one.rpartition(".")[2] for one in SHOWN))
        raise TensorParallelError(
            f"{name.rpartition('.')[2]} was not shown to be right on a sharded model: of TRL's trainers use {shown}, "
            "or set tensor_parallel.autotp_size to 1."
        )
    if getattr(args, "use_liger_kernel", False):
        raise TensorParallelError(
            "use_liger_kernel=True replaces forwards of layers that tensor parallelism shards; leave it off, the loss "
            "of a sharded head is fused already."
        )
    if getattr(args, "sync_ref_model", False) and plugin.zero_stage == 3:
        raise TensorParallelError(
            "sync_ref_model=True at ZeRO stage 3 updates the reference model on rank 0 of the world alone, which holds "
            "one tensor-parallel shard of it; use ZeRO stage 2."
        )


def known_as(kind: type) -> str:
    """The trainer of TRL that ``kind`` is, or is a subclass of, by its full name."""
    ours = next(one for one in kind.__mro__ if one.__module__.split(".")[0] == "trl")
    return f"{ours.__module__}.{ours.__qualname__}"
