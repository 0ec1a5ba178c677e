"""A TP group counts as one reader of data where Trainer counts processes or derives something from a rank.

- Tokens: Trainer divides ``num_items_in_batch``, by which the loss is divided, and the factor that data parallelism
  averages away, by ``get_tp_size()``. It assumes that ``Accelerator.gather`` and ``num_processes`` repeat every TP
  rank. With our slot accelerate counts a TP group once, and a single rank's token count (without
  ``average_tokens_across_devices``) was never repeated, so that degree is 1. Only ``get_total_train_batch_size``
  divides the world by it.
- Evaluation: Trainer assumes steps as wide as the world. A TP group reads one batch, so there are tp times as many
  steps a second. Samples and tokens are right as they are.
- Data loaders: ``train_sampling_strategy="batch_rebalance"`` would give each rank of a TP group other rows, and loader
  processes that augment samples at random would be seeded apart.
- ``TrainingArguments.world_size`` in a script is a factor of learning rates and batch sizes (``run_mae.py``), so a TP
  group counts once there. Installed libraries name files and seed samplers by it: they are given ranks.
- Random states: Trainer's checkpoint stores them by process index. From tp 2 x dp 2 to tp 1 x dp 4, process 1 would
  get those of (dp 0, tp 1): the masks of its neighbour, process 0. Each data-parallel rank's states in the engine's
  checkpoint are restored instead. On the same topology Trainer's files are right.
"""

from __future__ import annotations

import contextvars
import functools
import math
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch.distributed as dist
import transformers
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, trainer
from transformers.trainer_utils import seed_worker

from tp_plugin.integrations.accelerate.degree import degree_in, tp_size
from tp_plugin.integrations.accelerate.rng_state import start_in_step
from tp_plugin.integrations.features import TRAINER
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.weights.gather import unwrapped
from tp_plugin.weights.rng_state import restore_again

upstream = Upstream(TRAINER)
_LIBRARIES = (transformers.__file__, accelerate.__file__, Path(__file__).parents[1])  # these may lie anywhere
_INSTALLED = [
    *{Path(sysconfig.get_path(name)) for name in ("purelib", "platlib", "stdlib")},
    *(Path(file).parent for file in _LIBRARIES if file),
]


# ---- tokens ---------------------------------------------------------------------------------------------------------


@upstream.patch(Trainer, "get_tp_size", [], "it says how often a token is counted")
def _get_tp_size(original: Callable[..., int], self: Trainer) -> int:
    return 1 if tp_size() > 1 else original(self)


@upstream.patch(Trainer, "get_total_train_batch_size", ["args"], "it divides the world by the TP degree")
def _get_total_train_batch_size(original: Callable[..., int], self: Trainer, args: TrainingArguments) -> int:
    return original(self, args) // tp_size()


@upstream.patch(TrainingArguments, "world_size", [], "a script that multiplies by it would be tp times off")
def _world_size(original: Callable[..., int], self: TrainingArguments) -> int:
    ranks, plugin = original(self), getattr(self, "deepspeed_plugin", None)
    caller = sys._getframe(2).f_code.co_filename  # beyond this function and the property
    return ranks if plugin is None or _is_installed(caller) else ranks // degree_in(plugin.deepspeed_config)


@functools.cache
def _is_installed(file: str) -> bool:
    """Return True for code of a library: of one that counts ranks, or of any in the folder of installed packages."""
    return any(folder in Path(file).parents for folder in _INSTALLED)


# ---- evaluation -----------------------------------------------------------------------------------------------------

_EVAL_ROWS: contextvars.ContextVar[int | None] = contextvars.ContextVar(
    "rows of a rank's evaluation batch", default=None
)
_STEPS = "steps of an evaluation are counted over the whole world"
_METRICS = ["split", "start_time", "num_samples", "num_steps", "num_tokens"]


@upstream.patch(Trainer, "evaluate", ["eval_dataset", "ignore_keys", "metric_key_prefix"], _STEPS)
@upstream.patch(Trainer, "predict", ["test_dataset", "ignore_keys", "metric_key_prefix"], _STEPS)
def _evaluate(original: Callable[..., Any], self: Trainer, *args: Any, **kwargs: Any) -> Any:
    token = _EVAL_ROWS.set(self.args.eval_batch_size)
    try:
        return original(self, *args, **kwargs)
    finally:
        _EVAL_ROWS.reset(token)


@upstream.patch(trainer, "speed_metrics", _METRICS, _STEPS)
def _speed_metrics(
    original: Callable[..., dict],
    split: str,
    start_time: float,
    num_samples: float | None = None,
    num_steps: float | None = None,
    num_tokens: float | None = None,
) -> dict:
    rows, degree = _EVAL_ROWS.get(), tp_size()
    if rows and degree > 1 and num_samples and num_steps:
        world = dist.get_world_size()
        if num_steps == math.ceil(num_samples / (rows * world)):
            num_steps = math.ceil(num_samples / (rows * (world // degree)))
    return original(split, start_time, num_samples, num_steps, num_tokens)


# ---- data loaders ---------------------------------------------------------------------------------------------------

_SAMPLER = ["lengths", "effective_batch_size", "dp_size", "grad_accum", "shuffle", "seed", "rank", "drop_last"]
_LOADER = ["dataset", "description", "batch_size"]


@upstream.patch(
    "transformers.trainer_pt_utils:BatchRebalanceSampler",
    "__init__",
    _SAMPLER,
    "it gives rows to every rank of the world",
    since="5.17",
)
def _init_sampler(
    original: Callable[..., None],
    self: Any,
    lengths: list[int],
    effective_batch_size: int,
    dp_size: int,
    *args: Any,
    **kwargs: Any,
) -> None:
    degree = tp_size()
    if degree > 1 and dp_size == dist.get_world_size():
        effective_batch_size, dp_size = effective_batch_size // degree, dp_size // degree
        original(self, lengths, effective_batch_size, dp_size, *args, **kwargs)
        self.rank //= degree
    else:
        original(self, lengths, effective_batch_size, dp_size, *args, **kwargs)


@upstream.patch(Trainer, "_get_dataloader", _LOADER, "it seeds loader processes by rank")
def _get_dataloader(original: Callable[..., DataLoader], self: Trainer, *args: Any, **kwargs: Any) -> DataLoader:
    loader, degree = original(self, *args, **kwargs), tp_size()
    inner = getattr(loader, "base_dataloader", loader)  # accelerate wraps
    seeded = getattr(inner, "worker_init_fn", None)
    if degree > 1 and isinstance(seeded, functools.partial) and seeded.func is seed_worker:
        arguments = seeded.keywords | {"rank": self.args.process_index // degree}
        inner.worker_init_fn = functools.partial(seed_worker, **arguments)
    return loader


# ---- random states --------------------------------------------------------------------------------------------------


@upstream.patch(TrainingArguments, "__post_init__", [], "a group's random states are one from then on")
def _post_init(original: Callable[..., None], self: TrainingArguments) -> None:
    original(self)
    plugin = getattr(self, "deepspeed_plugin", None)
    if plugin is not None:
        start_in_step(degree_in(plugin.deepspeed_config), self.device)


@upstream.patch(Trainer, "_load_rng_state", ["checkpoint"], "random states of another topology are set after it")
def _load_rng_state(original: Callable[..., None], self: Trainer, checkpoint: str | None) -> None:
    original(self, checkpoint)
    if checkpoint is not None:
        restore_again(unwrapped(self.model), Path(checkpoint))
