"""Steps a second of ``evaluate`` and ``predict``, whose steps Trainer takes to be as wide as the whole world.

A TP group reads one batch, so there are tp times as many steps. Samples and tokens are counted right without us.
"""

from __future__ import annotations

import contextvars
import functools
import math
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from transformers import Trainer, trainer

from tp_plugin.integrations.accelerate.degree import tp_size
from tp_plugin.integrations.contract import Patches, contract

_BATCH: contextvars.ContextVar[int | None] = contextvars.ContextVar("rows of a rank's evaluation batch", default=None)


def check_contracts() -> None:
    why = "steps of an evaluation are counted over the whole world"
    contract(trainer, "speed_metrics", ["split", "start_time", "num_samples", "num_steps", "num_tokens"], why)
    contract(Trainer, "evaluate", ["eval_dataset", "ignore_keys", "metric_key_prefix"], why)
    contract(Trainer, "predict", ["test_dataset", "ignore_keys", "metric_key_prefix"], why)


def install(patches: Patches) -> None:
    patches.replace(trainer, "speed_metrics", _speed_metrics_function)
    patches.replace(Trainer, "evaluate", _evaluating)
    patches.replace(Trainer, "predict", _evaluating)


def _evaluating(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        token = _BATCH.set(self.args.eval_batch_size)
        try:
            return original(self, *args, **kwargs)
        finally:
            _BATCH.reset(token)

    return method


def _speed_metrics_function(original: Callable[..., dict]) -> Callable[..., dict]:
    @functools.wraps(original)
    def speed_metrics(
        split: str,
        start_time: float,
        num_samples: float | None = None,
        num_steps: float | None = None,
        num_tokens: float | None = None,
    ) -> dict:
        rows, degree = _BATCH.get(), tp_size()
        if rows and degree > 1 and num_samples and num_steps:
            world = dist.get_world_size()
            if num_steps == math.ceil(num_samples / (rows * world)):
                num_steps = math.ceil(num_samples / (rows * (world // degree)))
        return original(split, start_time, num_samples, num_steps, num_tokens)

    return speed_metrics
