"""Training on a machine without an accelerator, and optimizer state offloaded to the CPU.

Accelerate knows no backend for DeepSpeed on CPU: every process would think it is the only one, and the data loader
would divide by zero. ``use_cpu=True`` would silently replace DeepSpeed by DDP, which does not shard.

For offloaded state accelerate maps torch's AdamW, Adam and Adagrad, and bitsandbytes' of these names and Lion, to the
same optimizer of DeepSpeed's. Any other silently becomes Adam, at any tensor-parallel degree, so rank 0 warns.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import accelerate.accelerator
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from tp_plugin import log
from tp_plugin.integrations.accelerate.degree import tp_size, tp_size_of_launch, uses_deepspeed
from tp_plugin.integrations.features import CPU_TRAINING
from tp_plugin.integrations.upstream import Upstream

upstream = Upstream(CPU_TRAINING)

_SAME = {"adamw": "DeepSpeedCPUAdam", "adam": "DeepSpeedCPUAdam"} | {
    "adagrad": "DeepSpeedCPUAdagrad",
    "lion": "DeepSpeedCPULion",
}
"""Optimizer name -> DeepSpeed's CPU optimizer with the same step."""


def on_cpu_with_deepspeed() -> bool:
    """Tell if this is one of several processes started for DeepSpeed on a machine without an accelerator."""
    return uses_deepspeed() and int(os.environ.get("LOCAL_RANK", -1)) != -1 and not torch.accelerator.is_available()


def _ignores_cpu_option() -> bool:
    """Tell if asking for the CPU would only lose DeepSpeed, in a sharded training that runs on the CPU anyway."""
    return on_cpu_with_deepspeed() and tp_size_of_launch() > 1


@upstream.patch(
    PartialState,
    "_prepare_backend",
    ["cpu", "sagemaker_dp", "backend"],
    "it names the process group's backend, and knows none for DeepSpeed on CPU",
)
def _prepare_backend(original: Callable[..., Any], self: PartialState, *args: Any, **kwargs: Any) -> Any:
    found, kind = original(self, *args, **kwargs)
    if found is None and kind == DistributedType.NO and on_cpu_with_deepspeed():
        return "gloo", kind
    return found, kind


@upstream.patch(PartialState, "__init__", ["cpu"], "cpu=True would drop DeepSpeed")
def _init_process(original: Callable[..., None], self: PartialState, cpu: bool = False, **kwargs: Any) -> None:
    original(self, cpu and not _ignores_cpu_option(), **kwargs)


@upstream.patch(AcceleratorState, "__init__", ["mixed_precision", "cpu"], "cpu=True would drop DeepSpeed")
def _init_state(
    original: Callable[..., None],
    self: AcceleratorState,
    mixed_precision: str | None = None,
    cpu: bool = False,
    *args: Any,
    **kwargs: Any,
) -> None:
    if _ignores_cpu_option():
        cpu = False
        os.environ.pop("ACCELERATE_USE_CPU", None)  # accelerate reads it besides
    original(self, mixed_precision, cpu, *args, **kwargs)


@upstream.patch(
    accelerate.accelerator,
    "map_pytorch_optim_to_deepspeed",
    ["optimizer"],
    "an optimizer that it replaces by another is named",
)
def _map_pytorch_optim_to_deepspeed(original: Callable[[Any], Any], optimizer: Any) -> Any:
    made = original(optimizer)
    if tp_size() > 1 and not is_like(optimizer, made):
        name, other = type(optimizer).__name__, type(made).__name__
        decay = "with decoupled" if getattr(made, "adam_w_mode", False) else "without decoupled"
        log.warning(
            f"accelerate trains with {other} ({decay} weight decay) and not with the optimizer "
            f"{name}, since its state is offloaded, with tensor parallelism or without; set "
            '"zero_force_ds_cpu_optimizer": false in the DeepSpeed config to train with yours.',
        )
    return made


def is_like(optimizer: Any, made: Any) -> bool:
    """Tell if ``made``, a CPU optimizer of DeepSpeed's, steps as ``optimizer`` would."""
    name = type(optimizer).__name__.lower().removesuffix("32bit")
    if type(made).__name__ != _SAME.get(name):
        return type(made) is type(optimizer)
    return "adam" not in name or getattr(made, "adam_w_mode", None) is (name == "adamw")
