"""The public functions."""

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
from tp_plugin.step_guard.guard import guard_of
from tp_plugin.step_guard.trial import shard_proven


def register(config: TensorParallelConfig | None = None) -> None:
    """Register the module replacements and the loss in DeepSpeed's AutoTP slot, in this process.

    From then on the model of every engine whose DeepSpeed config sets ``tensor_parallel.autotp_size`` above 1 is
    sharded here: engines of ``deepspeed.initialize``, Accelerate, HF Trainer and TRL. Idempotent; several engines in
    one process work. Nothing changes for engines without ``autotp_size``.

    Args:
        config: options for engines whose DeepSpeed config has no ``tp_plugin`` block.

    Names that we rely on are checked. One that has moved costs the feature that needs it, refused when it is used.
    Versions that tests did not run with are named once, and the guard cannot be switched off there.

    Raises:
        TensorParallelError: a name has moved without which nothing can be sharded.
    """
    from tp_plugin.integrations.deepspeed import slot
    from tp_plugin.integrations.rooms import ROOMS, announce

    for room in ROOMS:
        room.install()
    slot.set_default(config)
    announce()


def unregister() -> None:
    """Undo :func:`register`: remove every patch of the other libraries. Models that are sharded stay sharded."""
    from tp_plugin.integrations.rooms import ROOMS

    for room in reversed(ROOMS):
        room.uninstall()


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
        TensorParallelError: on every rank, before anything is changed, with the module, the size and what would work.
    """
    register()
    if config is None:
        config = TensorParallelConfig(tp_size=dist.get_world_size() if dist.is_initialized() else 1)
    mesh = ParallelMesh.create(config.tp_size)
    return shard_proven(model, config, mesh)


def check_next_step(model_or_engine: nn.Module | Any) -> None:
    """Check the next training step of a sharded model like the first one: loss, gradients, replicas, batch.

    Raises:
        TensorParallelError: the model is not sharded. A failed check raises in that step.
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
    """Load a transformers model sharded: each rank reads its slices only. A collective call over the world.

    Equals ``model_class.from_pretrained`` followed by :func:`shard_model`, to the bit, without a full model in any
    rank's memory. The model is on the CPU and in eval mode, as transformers returns it. ``deepspeed.initialize`` with
    the same ``autotp_size`` trains it. Implies :func:`register`.

    Args:
        name_or_path: a directory, or the id of a repository of the hub, which one rank of a host downloads.
        tp_size: ranks to shard over; None: as ``config`` says, else the whole world.
        dtype: of the parameters; None or "auto": as the checkpoint's config says.
        model_class: a transformers model or auto class; None: the class that the checkpoint was saved from.
        revision: of the repository.
        trust_remote_code: run code of the repository.
        config: options besides ``tp_size``.
        options: the other options of transformers' ``from_pretrained`` (``attn_implementation``, ``token``,
            ``ignore_mismatched_sizes``, ``output_loading_info``, ...).

    Raises:
        TensorParallelError: on every rank: a checkpoint that is damaged or of another model, a model that cannot be
            sharded, an option that is not supported.
    """
    register()
    from tp_plugin.integrations.features import LOADING

    LOADING.require()
    from tp_plugin.integrations.transformers.from_pretrained import load_sharded, saved_class

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

    Of a ``PeftModel``, the adapters alone, in PEFT's own format. Training may go on afterwards.

    Tensors are gathered in buckets and written as they come, so a rank needs less than 512 MiB beside its shard of the
    model. Under ZeRO-3 it also needs the parameters of one bucket. A tensor that transformers computes from others on
    saving needs its full size.

    The ranks that see the directory share the files. Files are moved into it when all are on the disk: a save that
    fails before leaves an earlier model as it was. A save that is killed while files move leaves a directory without
    ``config.json``, which transformers does not load.

    Args:
        model_or_engine: a sharded transformers model, or the DeepSpeed engine around it.
        directory: created if missing. On a file system of its own, rank 0's host writes alone.
        options: as of transformers' ``save_pretrained``: ``max_shard_size`` (5GB), ``variant``, ``push_to_hub`` with
            ``repo_id``, ``token``, ``commit_message``, ``create_pr``, ``private``; ``save_original_format``.

    Raises:
        TensorParallelError: on every rank, when the model has no ``save_pretrained`` or writing failed.
    """
    from tp_plugin.integrations import peft
    from tp_plugin.integrations.features import SAVED_ADAPTERS, SAVING

    if peft.is_adapted(model_or_engine):
        SAVED_ADAPTERS.require()
        peft.save_adapters(model_or_engine, directory, **options)
        return
    SAVING.require()
    from tp_plugin.integrations.transformers import export

    export.save(model_or_engine, directory, **options)
