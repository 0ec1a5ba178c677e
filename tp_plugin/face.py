"""The verbs of the public face."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from tp_plugin.config import TensorParallelConfig
from tp_plugin.mesh import ParallelMesh
from tp_plugin.sharding import Sharding
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
    from tp_plugin.integrations import accelerate, deepspeed, transformers, trl
    from tp_plugin.integrations.contract import check_versions

    check_versions()
    deepspeed.install(config)
    accelerate.install()
    transformers.install()
    trl.install()


def unregister() -> None:
    """Give everything back to DeepSpeed, Accelerate and transformers. Models that are sharded stay so."""
    from tp_plugin.integrations import accelerate, deepspeed, transformers, trl

    trl.uninstall()
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
