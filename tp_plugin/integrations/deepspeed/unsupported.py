"""Combinations that would train wrongly or cannot work, refused in one sentence before training.

docs/compatibility.md has the table of what works, with a row and a test for every sentence here.
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
from tp_plugin.integrations.deepspeed.config import (
    given_group,
    put_config,
    read_config,
    refuse_section,
    settle,
    with_recorded,
    without_tripwire,
)
from tp_plugin.integrations.deepspeed.optimizers import (
    refuse_foreign_parameters,
    refuse_optimizer,
    warn_of_modes,
)
from tp_plugin.integrations.deepspeed.process_groups import refuse_other_groups
from tp_plugin.integrations.environment import refuse_no_degree, with_degree
from tp_plugin.mesh import ParallelMesh, check_world
from tp_plugin.sharding import state_of


def refuse_before_engine(arguments: dict[str, Any], options_of: Callable[[dict], TensorParallelConfig]) -> None:
    """Check the arguments of ``deepspeed.initialize``; raises TensorParallelError on every rank alike.

    Configurations are the same on every rank, so no collective is needed; process groups that the caller passes are
    compared on all ranks. A ``train_batch_size`` that matches the batch of a step is removed from ``arguments``.
    """
    raw = arguments.get("config") or arguments.get("config_params")
    raw = raw or getattr(arguments.get("args"), "deepspeed_config", None)
    if raw is None:
        return  # DeepSpeed raises its own error
    found = read_config(raw)
    read = without_tripwire(found)
    config, given = dict(with_degree(with_recorded(read))), with_degree(read)
    if given is not found:
        put_config(arguments, given)
    refuse_section(config.get("tensor_parallel"))
    options = options_of(config)
    mpu = arguments.get("mpu")
    record = state_of(arguments.get("model"))
    if isinstance(mpu, ParallelMesh):
        _refuse_other_mesh(mpu, None if record is None else record.mesh, options.tp_size)
        tp = mpu.tp_size
    elif record is not None and record.mesh.tp_size != options.tp_size:
        raise TensorParallelError(
            f"the model is sharded {record.mesh.tp_size} ways and tensor_parallel.autotp_size is {options.tp_size}: "
            f"DeepSpeed would average different shards; set autotp_size to {record.mesh.tp_size}."
        )
    elif options.tp_size > 1:
        tp = options.tp_size
    else:
        _refuse_degree_one(config, mpu)
        return
    _refuse_config(config, tp, arguments)
    if not isinstance(mpu, ParallelMesh):
        refuse_other_groups(tp, mpu, given_group(config.get("tensor_parallel")))
    settle(arguments, given, tp)


def _refuse_other_mesh(mpu: ParallelMesh, sharded: ParallelMesh | None, degree: int) -> None:
    if sharded is None or sharded.tp_size != mpu.tp_size:
        raise TensorParallelError(
            f"the model is not sharded over mpu=, a mesh of {mpu.tp_size} tensor-parallel ranks; first call "
            "record = tp_plugin.shard_model(model, ...) and pass mpu=record.mesh."
        )
    if degree not in (1, mpu.tp_size):
        raise TensorParallelError(
            f"mpu= has {mpu.tp_size} tensor-parallel ranks and tensor_parallel.autotp_size is {degree}; "
            "leave autotp_size out, or set it to the same."
        )


def _refuse_degree_one(config: Mapping[str, Any], mpu: Any) -> None:
    """Raise if the config asks for sharding without a degree above 1."""
    if mpu is None:
        refuse_no_degree(config, int(os.environ.get("WORLD_SIZE", "1")))
    if "tp_plugin" in config and _section(config, "tensor_parallel").get("autotp_size") != 1:
        raise TensorParallelError(
            "the DeepSpeed config has a tp_plugin block and no tensor_parallel.autotp_size above 1, so nothing would "
            'be sharded; add "tensor_parallel": {"autotp_size": N} (1: for checkpoints that any shape resumes), or '
            "remove the block."
        )
    if mpu is None and groups.mpu is not None and groups.mpu.get_model_parallel_world_size() > 1:
        size = groups.mpu.get_model_parallel_world_size()
        raise TensorParallelError(
            f"DeepSpeed cannot have an engine without tensor_parallel.autotp_size beside another that is sharded "
            f"{size} ways; set autotp_size to {size} for this model too."
        )


def refuse_config(config: Mapping[str, Any], tp: int) -> None:
    """Raise TensorParallelError for a DeepSpeed config alone, before a model or an optimizer exists."""
    refuse_section(config.get("tensor_parallel"))
    TensorParallelConfig.from_deepspeed(config)
    _refuse_config(config, tp, {})


def _refuse_config(config: Mapping[str, Any], tp: int, arguments: Mapping[str, Any]) -> None:
    if not dist.is_initialized() and {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        _initialise(arguments)
    check_world(tp)
    for feature, key in _features(config, arguments):
        raise TensorParallelError(f"{feature} does not combine with tensor parallelism; remove {key}.")
    zero = _section(config, "zero_optimization")
    for key in ("offload_optimizer", "offload_param"):
        if _section(zero, key).get("device") == "nvme":
            raise TensorParallelError(
                f"{key} to NVMe is not supported under tensor parallelism; set its device to cpu, which is."
            )
    refuse_optimizer(config, arguments.get("optimizer"))
    if isinstance(arguments.get("model"), nn.Module):
        replicas = dist.get_world_size() // tp if dist.is_initialized() else 1
        stage = _number(zero.get("stage"))
        refuse_foreign_parameters(arguments["model"], arguments.get("optimizer"), stage, replicas)
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
    """Yield each enabled feature that does not combine, and the key or argument that enables it."""
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
    """Make the process group as ``deepspeed.initialize`` would soon do: the world size is needed before."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    deepspeed.init_distributed(
        dist_backend=get_accelerator().communication_backend_name(),
        distributed_port=arguments.get("distributed_port", 29500),
        dist_init_required=arguments.get("dist_init_required"),
    )


def refuse_in_engine(engine: Any, model: nn.Module, tp: int) -> None:
    """Check again in the slot, with the engine's optimizer and mesh; a collective call, raises on every rank together.

    ``deepspeed.initialize`` may have been imported by name before :func:`tp_plugin.register` patched it.
    """
    error = None
    try:
        arguments = {"model": model, "optimizer": engine.client_optimizer, "mesh_param": engine.mesh_device}
        refuse_section(engine._config._param_dict.get("tensor_parallel"))
        _refuse_config(engine._config._param_dict, tp, arguments)
    except TensorParallelError as refused:
        error = str(refused)
    agree(error)


def refuse_after_engine(engine: Any) -> None:
    """Check the optimizer that the engine made of a callable or the config; a collective call."""
    if state_of(getattr(engine, "module", None)) is None:
        return
    error = None
    try:
        refuse_optimizer({}, getattr(engine, "basic_optimizer", None))
    except TensorParallelError as refused:
        error = str(refused)
    agree(error)
    warn_of_modes(engine)


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) else 0


def _is_pipeline(model: Any) -> bool:
    from deepspeed.pipe import PipelineModule

    return isinstance(model, PipelineModule)
