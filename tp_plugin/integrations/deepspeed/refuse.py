"""Combinations that would train wrongly or cannot work, refused in one sentence before training.

The table of what works is docs/compatibility.md; every sentence here has its row and its test there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tp_plugin.config import TensorParallelConfig
from tp_plugin.errors import TensorParallelError, agree
from tp_plugin.mesh import ParallelMesh, check_world
from tp_plugin.sharding import state_of

NOT_ELEMENTWISE = ("muon", "adafactor", "lamb", "shampoo", "soap", "lars", "galore", "apollo", "kfac")
ONE_BIT = ("onebitadam", "onebitlamb", "zerooneadam")


def refuse_before_engine(arguments: Mapping[str, Any], options_of: Callable[[dict], TensorParallelConfig]) -> None:
    """Check the arguments of ``deepspeed.initialize``; raises TensorParallelError on every rank alike.

    Configurations are the same on every rank, so no rank needs to ask the others.
    """
    raw = arguments.get("config") or arguments.get("config_params")
    raw = raw or getattr(arguments.get("args"), "deepspeed_config", None)
    if raw is None:
        return  # DeepSpeed says so itself
    config = _loaded(raw)
    options = options_of(config)
    model, mpu = arguments.get("model"), arguments.get("mpu")
    record = state_of(model)
    if isinstance(mpu, ParallelMesh) and record is not None:
        _refuse_config(config, mpu.tp_size, arguments)
        if options.tp_size not in (1, mpu.tp_size):
            raise TensorParallelError("pass either mpu= or tensor_parallel.autotp_size, not two different degrees.")
        return
    if record is not None and record.mesh.tp_size != options.tp_size:
        raise TensorParallelError(
            f"the model is sharded {record.mesh.tp_size} ways and tensor_parallel.autotp_size is {options.tp_size}: "
            f"DeepSpeed would average different shards; set autotp_size to {record.mesh.tp_size}."
        )
    if options.tp_size > 1:
        _refuse_config(config, options.tp_size, arguments)
    elif config.get("tp_plugin"):
        raise TensorParallelError(
            "the DeepSpeed config has a tp_plugin block and no tensor_parallel.autotp_size above 1, so nothing would "
            'be sharded; add "tensor_parallel": {"autotp_size": N}, or remove the block.'
        )


def _loaded(raw: Any) -> dict[str, Any]:
    if isinstance(raw, dict):
        return raw
    from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config

    return load_ds_config(raw)


def _refuse_config(config: Mapping[str, Any], tp: int, arguments: Mapping[str, Any]) -> None:
    check_world(tp)
    zero = config.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    if config.get("train_batch_size") is not None:
        raise TensorParallelError(
            "train_batch_size in the DeepSpeed config counts every rank, tensor-parallel ones too, so the batch would "
            f"be {tp} times smaller than it says; remove it and set train_micro_batch_size_per_gpu and "
            "gradient_accumulation_steps."
        )
    for reason, found in (
        ("mesh_param (Ulysses sequence parallelism) averages over tensor-parallel ranks", arguments.get("mesh_param")),
        ("sequence_parallel_size (Ulysses) has no process groups beside tensor parallelism", _above_one(config)),
        ("ZeRO++ quantised weights or gradients", _any(zero, "zero_quantized_weights", "zero_quantized_gradients")),
        (
            "hpZ (zero_hpz_partition_size) partitions over tensor-parallel ranks",
            zero.get("zero_hpz_partition_size", 1) > 1,
        ),
        ("MiCS (mics_shard_size) partitions over tensor-parallel ranks", zero.get("mics_shard_size", -1) > 0),
        ("DeepSpeed expert parallelism (expert_parallel)", (config.get("expert_parallel") or {}).get("enabled")),
        ("DeepCompile", (config.get("compile") or {}).get("deepcompile")),
        ("ZenFlow", zero.get("zenflow")),
        ("the hybrid engine", (config.get("hybrid_engine") or {}).get("enabled")),
        ("DeepSpeed pipeline parallelism", _is_pipeline(arguments.get("model"))),
    ):
        if found:
            raise TensorParallelError(f"{reason} does not combine with tensor parallelism here; switch it off.")
    _refuse_optimizer(config, arguments.get("optimizer"))
    precision = next((name for name in ("fp16", "bf16") if (config.get(name) or {}).get("enabled") is True), None)
    has_optimizer = arguments.get("optimizer") is not None or config.get("optimizer") is not None
    if stage == 0 and precision and has_optimizer:
        raise TensorParallelError(
            f"{precision} at ZeRO stage 0 computes a wrong gradient norm under tensor parallelism inside DeepSpeed; "
            'set "zero_optimization": {"stage": 1}, which costs nothing.'
        )


def _refuse_optimizer(config: Mapping[str, Any], client: Any) -> None:
    names = [str((config.get("optimizer") or {}).get("type", ""))]
    if client is not None:
        optimizer = getattr(client, "optimizer", client)  # accelerate wraps
        names += (
            [kind.__name__ for kind in type(optimizer).__mro__] if isinstance(optimizer, torch.optim.Optimizer) else []
        )
    for name in names:
        plain = name.lower().replace("_", "")
        if plain in ONE_BIT:
            raise TensorParallelError(
                f"the 1-bit optimizer {name} compresses over ranks that hold different shards; use AdamW."
            )
        if any(plain.startswith(kind) for kind in NOT_ELEMENTWISE):
            raise TensorParallelError(
                f"the optimizer {name} looks at a whole weight matrix and would see a shard of it; use an elementwise "
                "one (AdamW, Adam, SGD, Lion, Adagrad)."
            )


def refuse_in_engine(engine: Any, model: nn.Module) -> None:
    """Check what only the engine knows, in the slot; a collective call, raises on every rank together."""
    error = None
    if getattr(engine, "mesh_device", None) is not None:
        error = "mesh_param (Ulysses sequence parallelism) averages over tensor-parallel ranks; leave it out."
    elif getattr(model, "use_kernels", False):
        error = (
            "the model was loaded with use_kernels=True, whose replaced forwards bypass sharded layers; "
            "load it without."
        )
    agree(error)


def _any(options: Mapping[str, Any], *names: str) -> bool:
    return any(options.get(name) for name in names)


def _above_one(config: Mapping[str, Any]) -> bool:
    return int(config.get("sequence_parallel_size") or 1) > 1


def _is_pipeline(model: Any) -> bool:
    from deepspeed.pipe import PipelineModule

    return isinstance(model, PipelineModule)
