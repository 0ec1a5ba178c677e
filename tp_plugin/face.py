"""The verbs of the public face."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tp_plugin.config import TensorParallelConfig
from tp_plugin.errors import TensorParallelError
from tp_plugin.mesh import ParallelMesh
from tp_plugin.sharding import Sharding
from tp_plugin.verify.first_step import guard_of
from tp_plugin.verify.guard import shard_proven


def register(config: TensorParallelConfig | None = None) -> None:
    """Put our module replacements and loss into DeepSpeed's AutoTP slot, in this process.

    From then on every engine whose DeepSpeed config sets ``tensor_parallel.autotp_size`` above 1 is sharded by us,
    whoever makes it: ``deepspeed.initialize``, Accelerate, HF Trainer, TRL. Idempotent, and several engines in one
    process work. Nothing changes for engines without ``autotp_size``.

    Args:
        config: options for engines whose DeepSpeed config has no ``tp_plugin`` block.

    Raises:
        TensorParallelError: an unsupported version of a library, or a private name we rely on has moved.
    """
    from tp_plugin.integrations import accelerate, deepspeed, peft, transformers, trl
    from tp_plugin.integrations.contract import check_versions

    check_versions()
    deepspeed.install(config)
    accelerate.install()
    transformers.install()
    peft.install()
    trl.install()


def unregister() -> None:
    """Give everything back to DeepSpeed, Accelerate and transformers. Models that are sharded stay so."""
    from tp_plugin.integrations import accelerate, deepspeed, peft, transformers, trl

    trl.uninstall()
    peft.uninstall()
    transformers.uninstall()
    accelerate.uninstall()
    deepspeed.uninstall()


def shard_model(model: nn.Module, config: TensorParallelConfig | None = None) -> Sharding:
    """Shard ``model`` in place, now. A collective call over the whole world; implies :func:`register`.

    ``nn.Parameter`` objects and their names survive (their ``.data`` becomes this rank's shard), so an optimizer made
    before stays valid. ``deepspeed.initialize`` with the same ``autotp_size``, or with ``mpu=`` the returned record's
    ``mesh``, then trains it as it is.

    Args:
        model: a transformers model, or any module for which ``config.plan`` has rules; on CPU or on its device.
        config: ``tp_size`` and options; None shards over the whole world.

    Returns:
        The record of what was done: ``plan``, ``mesh``, ``layouts``, ``summary()``.

    Raises:
        TensorParallelError: on every rank together and before anything was changed, naming the module, the size and
            what would work.
    """
    register()
    if config is None:
        config = TensorParallelConfig(tp_size=dist.get_world_size() if dist.is_initialized() else 1)
    mesh = ParallelMesh.create(config.tp_size)
    return shard_proven(model, config, mesh)


def check_next_step(model_or_engine: nn.Module | Any) -> None:
    """Check the next training step of a sharded model as the first one was: loss, gradients, replicas, batch.

    Raises:
        TensorParallelError: the model is not sharded. What the check itself finds is raised in that step.
    """
    guard = guard_of(model_or_engine)
    if guard is None:
        raise TensorParallelError("check_next_step needs a sharded model: shard it, or make its engine, first.")
    guard.request()


def from_pretrained(
    name_or_path: str | Path,
    *,
    tp_size: int | None = None,
    dtype: torch.dtype | str | None = None,
    model_class: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    config: TensorParallelConfig | None = None,
    **options: Any,
) -> Any:
    """Load a transformers model sharded: each rank reads its slices and no more. A collective call over the world.

    Equals ``model_class.from_pretrained`` followed by :func:`shard_model`, to the bit, without the whole model ever
    being in a rank's memory. The model is on the CPU and in eval mode, as transformers returns it;
    ``deepspeed.initialize`` with the same ``autotp_size`` trains it. Implies :func:`register`.

    Args:
        name_or_path: a directory, or the id of a repository of the hub, which one rank of a host downloads.
        tp_size: ranks to shard over; None: as ``config`` says, else the whole world.
        dtype: of the parameters; None or "auto": as the checkpoint's config says.
        model_class: a transformers model or auto class; None: the class that the checkpoint was saved from.
        revision: of the repository.
        trust_remote_code: run code of the repository.
        config: options besides ``tp_size``.
        options: whatever else transformers' ``from_pretrained`` takes (``attn_implementation``, ``token``,
            ``ignore_mismatched_sizes``, ``output_loading_info``, ...).

    Raises:
        TensorParallelError: on every rank together: a checkpoint that is damaged or not this model's, a model that
            cannot be sharded, an option that cannot be served.
    """
    register()
    from tp_plugin.integrations.transformers.load import load_sharded, saved_class

    if config is None:
        config = TensorParallelConfig(tp_size=dist.get_world_size() if dist.is_initialized() else 1)
    if tp_size is not None:
        config = dataclasses.replace(config, tp_size=tp_size)
    name = str(name_or_path)
    found = {"trust_remote_code": trust_remote_code} | ({} if revision is None else {"revision": revision})

    def call() -> Any:
        chosen = saved_class(name, found | options) if model_class is None else model_class
        return chosen.from_pretrained(name, dtype=dtype or "auto", **found, **options)

    return load_sharded(call, name, config)


def save_pretrained(model_or_engine: nn.Module | Any, directory: str | Path, **options: Any) -> None:
    """Write safetensors and config that plain ``from_pretrained`` loads in one process. A collective call.

    Of a ``PeftModel``, the adapters alone, in PEFT's own format.

    Tensors are gathered in buckets and written as they come: beyond its shard of the model a rank holds less than
    512 MiB (and under ZeRO-3 one bucket's parameters whole over data parallelism; a single tensor that transformers
    computes from others on saving is held whole). The files are dealt over all ranks that see the directory. They
    are moved into it when all are on the disk: a save that fails before leaves an earlier one as it was, one that is
    killed while files move leaves a directory without ``config.json``, which nobody loads. Training may go on
    afterwards with the very same parameters.

    Args:
        model_or_engine: a sharded transformers model, or the DeepSpeed engine around it.
        directory: created if missing. On a file system of its own, rank 0's host writes alone.
        options: as of transformers' ``save_pretrained``: ``max_shard_size`` (5GB), ``variant``, ``push_to_hub`` with
            ``repo_id``, ``token``, ``commit_message``, ``create_pr``, ``private``; ``save_original_format``.

    Raises:
        TensorParallelError: on every rank, when the model has no ``save_pretrained`` or writing failed.
    """
    from tp_plugin.integrations import peft
    from tp_plugin.integrations.transformers import export

    save = peft.save_adapters if peft.is_adapted(model_or_engine) else export.save
    save(model_or_engine, directory, **options)
