"""DeepSpeed on a machine without accelerator, from scripts as they are.

Accelerate knows no backend for DeepSpeed on CPU: every process takes itself for the only one, and the data loader
divides by zero. And ``use_cpu=True``, superfluous there, silently drops DeepSpeed for DDP, the sharding with it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from tp_plugin.integrations.accelerate.degree import tp_size_of_launch, uses_deepspeed
from tp_plugin.integrations.contract import Patches, contract


def check_contracts() -> None:
    why = "it names the process group's backend, and knows none for DeepSpeed on CPU"
    contract(PartialState, "_prepare_backend", ["cpu", "sagemaker_dp", "backend"], why)
    contract(PartialState, "__init__", ["cpu"], "cpu=True would drop DeepSpeed")
    contract(AcceleratorState, "__init__", ["mixed_precision", "cpu"], "cpu=True would drop DeepSpeed")


def install(patches: Patches) -> None:
    patches.replace(PartialState, "_prepare_backend", _prepare_backend_method)
    patches.replace(PartialState, "__init__", _init_method)
    patches.replace(AcceleratorState, "__init__", _init_of_accelerator_state)


def on_cpu_with_deepspeed() -> bool:
    """One of several processes started for DeepSpeed on a machine without accelerator."""
    return uses_deepspeed() and int(os.environ.get("LOCAL_RANK", -1)) != -1 and not torch.accelerator.is_available()


def _prepare_backend_method(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _prepare_backend(
        self: PartialState, cpu: bool = False, sagemaker_dp: bool = False, backend: str | None = None
    ) -> Any:
        found, kind = original(self, cpu, sagemaker_dp, backend)
        if found is None and kind == DistributedType.NO and on_cpu_with_deepspeed():
            return "gloo", kind
        return found, kind

    return _prepare_backend


def _init_method(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: PartialState, cpu: bool = False, **kwargs: Any) -> None:
        original(self, cpu and not _superfluous(), **kwargs)

    return __init__


def _init_of_accelerator_state(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(
        self: AcceleratorState, mixed_precision: str | None = None, cpu: bool = False, *args: Any, **kwargs: Any
    ) -> None:
        if _superfluous():
            cpu = False
            os.environ.pop("ACCELERATE_USE_CPU", None)  # which it reads besides
        original(self, mixed_precision, cpu, *args, **kwargs)

    return __init__


def _superfluous() -> bool:
    """Asking for the CPU changes nothing here, but that a sharded training would lose DeepSpeed."""
    return on_cpu_with_deepspeed() and tp_size_of_launch() > 1
