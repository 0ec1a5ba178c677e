"""DeepSpeed configs: for an engine that a loop makes, and for scripts of which Trainer or Accelerate fill in sizes."""

from __future__ import annotations

from typing import Any

MICRO, ACCUMULATION, CLIP = 2, 2, 0.5
COMMON = {"zero_force_ds_cpu_optimizer": False}
"""PyTorch's optimizers are kept under offload, as references use them."""


def config_for(tp: int, stage: int, **extra: Any) -> dict[str, Any]:
    """A config with sizes; ``zero`` in ``extra`` goes into ``zero_optimization``."""
    return {
        **COMMON,
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **extra.pop("zero", {})},
        "zero_allow_untested_optimizer": True,
        "tensor_parallel": {"autotp_size": tp},
        "tp_plugin": {"check_batch_every": 2, "quiet": True},
        **extra,
    }


def auto_config(stage: int, zero: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A config whose sizes are the script's, without tensor parallelism unless ``more`` has it."""
    return {
        **COMMON,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, **(zero or {})},
        **more,
    }
