"""Combinations that would train wrongly or cannot work, refused in one sentence before training.

The table of what works is docs/compatibility.md; every sentence here has its row and its test there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch.distributed as dist
from deepspeed.utils import groups
from torch import nn

from tp_plugin.config import TensorParallelConfig
from tp_plugin.errors import TensorParallelError, agree
from tp_plugin.integrations.deepspeed.optimizers import refuse_optimizer
from tp_plugin.mesh import ParallelMesh, check_world
from tp_plugin.sharding import state_of


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
    if isinstance(mpu, ParallelMesh):
        if record is None or record.mesh.tp_size != mpu.tp_size:
            raise TensorParallelError(
                f"mpu= is a mesh of {mpu.tp_size} tensor-parallel ranks and the model is not sharded over it; call "
                "tp_plugin.shard_model(model, ...) first and pass mpu=record.mesh of the record it returns."
            )
        if options.tp_size not in (1, mpu.tp_size):
            raise TensorParallelError(
                f"mpu= has {mpu.tp_size} tensor-parallel ranks and tensor_parallel.autotp_size is {options.tp_size}; "
                "leave autotp_size out, or set it to the same."
            )
        _refuse_config(config, mpu.tp_size, arguments)
        return
    if mpu is not None and options.tp_size > 1:
        raise TensorParallelError(
            f"tensor_parallel.autotp_size makes the process groups itself, and mpu= brings others "
            f"({type(mpu).__name__}); leave mpu= out, or pass the mesh that tp_plugin.shard_model returns."
        )
    if record is not None and record.mesh.tp_size != options.tp_size:
        raise TensorParallelError(
            f"the model is sharded {record.mesh.tp_size} ways and tensor_parallel.autotp_size is {options.tp_size}: "
            f"DeepSpeed would average different shards; set autotp_size to {record.mesh.tp_size}."
        )
    if options.tp_size > 1:
        _refuse_config(config, options.tp_size, arguments)
    elif "tp_plugin" in config and _section(config, "tensor_parallel").get("autotp_size") != 1:
        raise TensorParallelError(
            "the DeepSpeed config has a tp_plugin block and no tensor_parallel.autotp_size above 1, so nothing would "
            'be sharded; add "tensor_parallel": {"autotp_size": N} (1: for checkpoints that any shape resumes), or '
            "remove the block."
        )
    elif mpu is None and groups.mpu is not None and groups.mpu.get_model_parallel_world_size() > 1:
        size = groups.mpu.get_model_parallel_world_size()
        raise TensorParallelError(
            f"another engine of this process is sharded {size} ways and this one has no tensor_parallel.autotp_size, "
            f"which DeepSpeed cannot do side by side; set autotp_size to {size} for this model too."
        )


def _loaded(raw: Any) -> dict[str, Any]:
    if isinstance(raw, dict):
        return raw
    from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config

    return load_ds_config(raw)


def _refuse_config(config: Mapping[str, Any], tp: int, arguments: Mapping[str, Any]) -> None:
    if not dist.is_initialized() and {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        _initialise(arguments)
    check_world(tp)
    if config.get("train_batch_size") is not None:
        raise TensorParallelError(
            "train_batch_size in the DeepSpeed config counts every rank, tensor-parallel ones too, so the batch would "
            f"be {tp} times smaller than it says; remove it and set train_micro_batch_size_per_gpu and "
            "gradient_accumulation_steps."
        )
    for feature, key in _features(config, arguments):
        raise TensorParallelError(f"{feature} does not combine with tensor parallelism; remove {key}.")
    zero = _section(config, "zero_optimization")
    for key in ("offload_optimizer", "offload_param"):
        if _section(zero, key).get("device") == "nvme":
            raise TensorParallelError(
                f"{key} to NVMe is not supported under tensor parallelism; set its device to cpu, which is."
            )
    refuse_optimizer(config, arguments.get("optimizer"))
    has_optimizer = arguments.get("optimizer") is not None or config.get("optimizer") is not None
    if _number(zero.get("stage")) == 0 and has_optimizer:
        for name in ("fp16", "bf16", "bfloat16"):
            if _section(config, name).get("enabled") is True:
                raise TensorParallelError(
                    f"{name} at ZeRO stage 0 computes a wrong gradient norm under tensor parallelism inside DeepSpeed; "
                    'set "zero_optimization": {"stage": 1}, which costs nothing.'
                )
        autocast = _section(config, "torch_autocast")
        if autocast.get("enabled") is True and "16" in str(autocast.get("dtype")) and "b" not in str(autocast["dtype"]):
            raise TensorParallelError(
                "torch_autocast in float16 at ZeRO stage 0 lets each tensor-parallel rank decide alone to skip a step; "
                'set "zero_optimization": {"stage": 1}, which costs nothing, or use bfloat16.'
            )


def _features(config: Mapping[str, Any], arguments: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is switched on and does not combine, and the key or argument that switches it on."""
    zero = _section(config, "zero_optimization")
    if arguments.get("mesh_param") is not None:
        yield "Ulysses sequence parallelism, which would average over tensor-parallel ranks,", "mesh_param"
    if _number(config.get("sequence_parallel_size")) > 1:
        yield "Ulysses sequence parallelism", "sequence_parallel_size"
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        if zero.get(key):
            yield "ZeRO++ quantisation", f"zero_optimization.{key}"
    if _number(zero.get("zero_hpz_partition_size")) > 1:
        yield "hpZ, which would partition over tensor-parallel ranks,", "zero_optimization.zero_hpz_partition_size"
    if _number(zero.get("mics_shard_size")) > 0:
        yield "MiCS, which would partition over tensor-parallel ranks,", "zero_optimization.mics_shard_size"
    if zero.get("zenflow"):
        yield "ZenFlow", "zero_optimization.zenflow"
    if _section(zero, "offload_optimizer").get("super_offload"):
        yield "SuperOffload", "zero_optimization.offload_optimizer.super_offload"
    if _section(zero, "offload_optimizer").get("ratio", 1) != 1:
        yield "Twin-Flow's second optimizer", "zero_optimization.offload_optimizer.ratio"
    for feature, block, key in (
        ("DeepSpeed's expert parallelism", "expert_parallel", "enabled"),
        ("DeepCompile", "compile", "deepcompile"),
        ("the hybrid engine", "hybrid_engine", "enabled"),
        ("DeepSpeed's data efficiency library (random-LTD, curriculum)", "data_efficiency", "enabled"),
    ):
        if _section(config, block).get(key):
            yield feature, f"{block}.{key}"
    if config.get("weight_quantization"):
        yield "weight quantisation", "weight_quantization"
    if _is_pipeline(arguments.get("model")):
        yield "DeepSpeed's pipeline parallelism", "PipelineModule and pass the plain model"


def _initialise(arguments: Mapping[str, Any]) -> None:
    """The process group, as ``deepspeed.initialize`` makes it in a moment: the world's size is asked before that."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    deepspeed.init_distributed(
        dist_backend=get_accelerator().communication_backend_name(),
        distributed_port=arguments.get("distributed_port", 29500),
        dist_init_required=arguments.get("dist_init_required"),
    )


def refuse_in_engine(engine: Any, model: nn.Module, tp: int) -> None:
    """Check again in the slot, with what only the engine knows; a collective call, raises on every rank together.

    ``deepspeed.initialize`` may have been imported by name before :func:`tp_plugin.register` put the first check there.
    """
    error = None
    try:
        arguments = {"model": model, "optimizer": engine.client_optimizer, "mesh_param": engine.mesh_device}
        _refuse_config(engine._config._param_dict, tp, arguments)
        if getattr(model, "use_kernels", False):
            error = (
                "the model was loaded with use_kernels=True, whose replaced forwards bypass sharded layers; "
                "load it without."
            )
    except TensorParallelError as refused:
        error = str(refused)
    agree(error)


def refuse_after_engine(engine: Any) -> None:
    """Check the optimizer that a callable or the config has made in the meantime; a collective call."""
    if state_of(getattr(engine, "module", None)) is None:
        return
    error = None
    try:
        refuse_optimizer({}, getattr(engine, "basic_optimizer", None))
    except TensorParallelError as refused:
        error = str(refused)
    agree(error)


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) else 0


def _is_pipeline(model: Any) -> bool:
    from deepspeed.pipe import PipelineModule

    return isinstance(model, PipelineModule)
