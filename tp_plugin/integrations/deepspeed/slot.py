"""DeepSpeed's AutoTP slot: the one engine method through which a model is sharded when autotp_size is set."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.module_inject import auto_ep_layer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.tensor_parallel import init_utils
from deepspeed.utils import groups
from torch import nn

from tp_plugin.config import TensorParallelConfig
from tp_plugin.errors import TensorParallelError, agree
from tp_plugin.integrations.contract import Patches, contract
from tp_plugin.integrations.deepspeed import backward, checkpoint, cpu, export, norm
from tp_plugin.integrations.deepspeed.refuse import refuse_after_engine, refuse_before_engine, refuse_in_engine
from tp_plugin.mesh import ParallelMesh
from tp_plugin.sharding import Sharding, state_of
from tp_plugin.verify.guard import shard_proven
from tp_plugin.weights.stream import note_engine

_PATCHES = Patches()
_ANNOUNCED: weakref.WeakSet[Sharding] = weakref.WeakSet()  # a model may meet several engines, early sharded or not
_DEFAULT: TensorParallelConfig | None = None


def install(default: TensorParallelConfig | None = None) -> None:
    """Take the slot in this process; calling it again only changes ``default``.

    Args:
        default: options for engines whose DeepSpeed config has no ``tp_plugin`` block.
    """
    global _DEFAULT
    _DEFAULT = default
    if _PATCHES:
        return
    check_contracts()
    _PATCHES.replace(DeepSpeedEngine, "_apply_autotp_partitioning", lambda _original: _slot)
    _PATCHES.replace(deepspeed, "initialize", _checked)
    cpu.install(_PATCHES)
    backward.install(_PATCHES)
    norm.install(_PATCHES)
    export.install(_PATCHES)
    checkpoint.install(_PATCHES)


def uninstall() -> None:
    """Give the slot back. Models that are sharded stay so."""
    _PATCHES.undo()


def check_contracts() -> None:
    """Every private name of DeepSpeed this package touches, checked. Raises TensorParallelError naming what moved."""
    slot = "it is the slot we shard models in"
    contract(DeepSpeedEngine, "_apply_autotp_partitioning", ["model", "tp_config"], slot)
    contract(DeepSpeedEngine, "autotp_size", [], "the slot reads the tensor-parallel degree from it")
    contract(groups, "get_tensor_model_parallel_group", [], "the slot shards over this group")
    contract(groups, "get_data_parallel_group", [], "the slot's mesh has this data-parallel group")
    contract(groups, "mpu", None, "an unsharded engine beside a sharded one is refused")
    contract(groups, "get_tensor_model_parallel_world_size", [], "a second engine must ask for the same degree")
    contract(groups, "_init_tp_mesh_device", ["tensor_model_parallel_size"], "it makes the groups the slot uses")
    contract(auto_ep_layer, "ReplacementSourceMap", [], "the slot returns one, empty")
    contract(init_utils, "load_ds_config", ["config"], "a config given as a file is read as DeepSpeed reads it")
    contract(deepspeed, "initialize", ["args", "model", "optimizer"], "configurations are checked before it runs")
    cpu.check_contracts()
    backward.check_contracts()
    norm.check_contracts()
    export.check_contracts()
    checkpoint.check_contracts()


def options_of(config: dict[str, Any]) -> TensorParallelConfig:
    """Our configuration for an engine: its ``tp_plugin`` block, or what :func:`install` was given."""
    ours = TensorParallelConfig.from_deepspeed(config)
    if _DEFAULT is None or "tp_plugin" in config:
        return ours
    if _DEFAULT.tp_size not in (1, ours.tp_size):
        raise TensorParallelError(
            f"register() was given tp_size={_DEFAULT.tp_size} and the DeepSpeed config has "
            f"tensor_parallel.autotp_size={ours.tp_size}; set it in the DeepSpeed config only."
        )
    return TensorParallelConfig(**(vars(_DEFAULT) | {"tp_size": ours.tp_size}))


def _checked(original: Callable[..., Any]) -> Callable[..., Any]:
    """``deepspeed.initialize``, refusing what would train wrongly before an engine exists."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def initialize(*args: Any, **kwargs: Any) -> Any:
        refuse_before_engine(signature.bind(*args, **kwargs).arguments, options_of)
        found = original(*args, **kwargs)
        refuse_after_engine(found[0])
        if state_of(getattr(found[0], "module", None)) is not None:  # sharded before, and passed by mpu=
            note_engine(found[0].module, found[0])
        return found

    return initialize


def _slot(engine: DeepSpeedEngine, model: nn.Module, tp_config: Any) -> Any:
    """What the engine calls instead of AutoTP's own partitioning. Idempotent: a sharded model is left as it is."""
    error, config = None, None
    try:
        config = options_of(engine._config._param_dict)
        existing = groups.get_tensor_model_parallel_world_size()
        if existing != config.tp_size:
            error = (
                f"DeepSpeed's tensor-parallel groups of this process have {existing} ranks and this engine asks for "
                f"{config.tp_size}; use one autotp_size for all engines of a process."
            )
    except TensorParallelError as refused:
        error = str(refused)
    agree(error)
    assert config is not None
    refuse_in_engine(engine, model, config.tp_size)
    mesh = ParallelMesh.of_groups(groups.get_tensor_model_parallel_group(), groups.get_data_parallel_group())
    record = shard_proven(model, config, mesh)
    note_engine(model, engine)
    model.ds_autotp_parsed = True  # type: ignore[assignment]
    # our own guard compares batches, at intervals and without pickling them
    if engine.first_dataloader_check is not None:
        engine.first_dataloader_check.remove()
    # DeepSpeed multiplied by the whole world; a TP group reads one batch
    engine._config.train_batch_size = (
        engine.train_micro_batch_size_per_gpu() * engine.gradient_accumulation_steps() * mesh.dp_size
    )
    _announce(record, engine, config.quiet)
    return auto_ep_layer.ReplacementSourceMap()


def _announce(record: Sharding, engine: DeepSpeedEngine, quiet: bool) -> None:
    """Say once a model what was done and what is doubtful; a collective call."""
    mesh = record.mesh
    if record in _ANNOUNCED:
        return
    _ANNOUNCED.add(record)
    spanned = mesh.hosts_spanned()
    if dist.get_rank() == 0 and not quiet:
        print(record.summary(engine.zero_optimization_stage()), flush=True)
        if record.equalised:
            print(
                f"tp_plugin: {len(record.equalised)} tensors differed between the ranks of a tensor-parallel group "
                "(were they seeded differently?); all ranks now have those of its rank 0.",
                flush=True,
            )
    if spanned > 1 and mesh.tp_rank == 0:
        print(
            f"tp_plugin: WARNING: the tensor-parallel group of rank {dist.get_rank()} spans {spanned} hosts; every "
            "layer waits for the network. Choose autotp_size at most the number of GPUs of a host.",
            flush=True,
        )
