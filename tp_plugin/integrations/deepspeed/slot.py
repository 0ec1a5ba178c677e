"""DeepSpeed's AutoTP slot: the one engine method through which a model is sharded when autotp_size is set."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups
from torch import nn

from tp_plugin import log
from tp_plugin.config import TensorParallelConfig
from tp_plugin.errors import TensorParallelError, agree
from tp_plugin.integrations import zero3
from tp_plugin.integrations.deepspeed.config import BATCH, refuse_other_rules
from tp_plugin.integrations.deepspeed.unsupported import refuse_after_engine, refuse_before_engine, refuse_in_engine
from tp_plugin.integrations.features import SLOT
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.integrations.versions import is_before
from tp_plugin.mesh import ParallelMesh, take_device
from tp_plugin.partitioned import shard_shape
from tp_plugin.sharding import Sharding, state_of
from tp_plugin.sharding.require_same import flattened, require_same
from tp_plugin.step_guard.guard import guard_of
from tp_plugin.step_guard.reachable_state import LEFT_ALONE
from tp_plugin.step_guard.trial import shard_proven
from tp_plugin.weights.gather import note_engine

upstream = Upstream(SLOT)
for _owner, _name, _parameters, _why in (
    (DeepSpeedEngine, "autotp_size", [], "the slot reads the tensor-parallel degree from it"),
    (groups, "get_tensor_model_parallel_group", [], "the slot shards over this group"),
    (groups, "get_data_parallel_group", [], "the slot's mesh has this data-parallel group"),
    (groups, "mpu", None, "an unsharded engine beside a sharded one is refused"),
    (groups, "get_tensor_model_parallel_world_size", [], "a second engine must ask for the same degree"),
):
    upstream.needs(_owner, _name, _parameters, _why)

_ANNOUNCED: weakref.WeakSet[Sharding] = weakref.WeakSet()  # several engines may share a model, or shard it early
_DEFAULT: TensorParallelConfig | None = None


def set_default(default: TensorParallelConfig | None) -> None:
    """Set the options for engines whose DeepSpeed config has no ``tp_plugin`` block."""
    global _DEFAULT
    _DEFAULT = default


@upstream.then
def _leave_attributes_alone() -> None:
    LEFT_ALONE.extend(name for name in zero3.MODULE_ATTRIBUTES if name not in LEFT_ALONE)


def options_of(config: dict[str, Any]) -> TensorParallelConfig:
    """Our configuration of an engine: its ``tp_plugin`` block, or the default of :func:`set_default`."""
    ours = TensorParallelConfig.from_deepspeed(config)
    if _DEFAULT is None or "tp_plugin" in config:
        return ours
    if _DEFAULT.tp_size not in (1, ours.tp_size):
        raise TensorParallelError(
            f"register() was given tp_size={_DEFAULT.tp_size} and the DeepSpeed config has "
            f"tensor_parallel.autotp_size={ours.tp_size}; set it in the DeepSpeed config only."
        )
    return TensorParallelConfig(**(vars(_DEFAULT) | {"tp_size": ours.tp_size}))


@upstream.patch(deepspeed, "initialize", ["args", "model", "optimizer"], "configurations are checked before it runs")
def _initialize(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Refuse configurations that would train wrongly before an engine exists."""
    given = inspect.signature(original).bind(*args, **kwargs)
    refuse_before_engine(given.arguments, options_of)
    found = original(*given.args, **given.kwargs)
    refuse_after_engine(found[0])
    if state_of(getattr(found[0], "module", None)) is not None:  # sharded before, and passed by mpu=
        note_engine(found[0].module, found[0])
    return found


_DIVIDES_TWICE = is_before("deepspeed", "0.19.6")
_COMPARED = "the first loss is compared over a tensor-parallel group"


@upstream.patch(DeepSpeedEngine, "backward", ["loss", "retain_graph", "scale_wrt_gas"], _COMPARED)
def _backward(
    original: Callable[..., Any],
    self: DeepSpeedEngine,
    loss: Any,
    retain_graph: bool = False,
    scale_wrt_gas: bool = True,
) -> Any:
    """Compare the first backward loss across TP ranks.

    Before 0.19.6 DeepSpeed divides the gradient of each output of a forward by the accumulation steps. A loss that the
    model computes from its logits is then divided twice, so it is divided here instead.
    """
    guard = guard_of(self.module)
    if guard is not None:
        guard.before_backward(loss)
    if scale_wrt_gas and _DIVIDES_TWICE and state_of(self.module) is not None:
        return original(self, loss / self.gradient_accumulation_steps(), retain_graph, False)
    return original(self, loss, retain_graph, scale_wrt_gas)


_CONFIGURED, _SLOT = ["model", "tp_config"], "it is the slot we shard models in"


@upstream.patch(DeepSpeedEngine, "_apply_autotp_partitioning", _CONFIGURED, _SLOT, since="0.18.6")
def _shard_in_slot(original: Callable[..., Any], engine: DeepSpeedEngine, model: nn.Module, tp_config: Any) -> Any:
    """Shard the model in place of AutoTP, which leaves a model with a mark alone and returns what the engine expects.

    Idempotent: a sharded model is left as it is.
    """
    _shard(engine, model)
    return original(engine, model, tp_config)


@upstream.patch(DeepSpeedEngine, "_configure_tensor_parallel", _CONFIGURED, _SLOT, until="0.18.6")
def _shard_behind_groups(
    original: Callable[..., Any], engine: DeepSpeedEngine, model: nn.Module, tp_config: Any
) -> None:
    """Shard the model when the groups exist: these versions have no slot after them, and AutoTP shards earlier."""
    original(engine, model, tp_config)
    _shard(engine, model)


@upstream.patch(
    DeepSpeedEngine,
    "_configure_tensor_parallel_states",
    ["model"],
    "its AutoTP cannot be sharded at ZeRO stage 3 in these versions, and it asserts so",
    until="0.19.4",
)
def _configure_states(original: Callable[..., Any], engine: DeepSpeedEngine, model: nn.Module) -> None:
    """Let the assertion of AutoTP's stage pass: our shards train at stage 3, too."""
    engine.__dict__["zero_optimization_stage"] = lambda: 0
    try:
        original(engine, model)
    finally:
        del engine.__dict__["zero_optimization_stage"]


def _shard(engine: DeepSpeedEngine, model: nn.Module) -> None:
    take_device()  # as AutoTP does: the collective calls below send from this process's GPU
    error, options = None, None
    try:
        options = options_of(engine._config._param_dict)
        existing = groups.get_tensor_model_parallel_world_size()
        if existing != options.tp_size:
            error = (
                f"DeepSpeed's tensor-parallel groups of this process have {existing} ranks and this engine asks for "
                f"{options.tp_size}; use one autotp_size for all engines of a process."
            )
    except TensorParallelError as refused:
        error = str(refused)
    agree(error)
    assert options is not None
    refuse_in_engine(engine, model, options.tp_size)
    require_same(flattened(engine._config._param_dict, "of the DeepSpeed config"))
    mesh = ParallelMesh.of_groups(groups.get_tensor_model_parallel_group(), groups.get_data_parallel_group())
    record = shard_proven(model, options, mesh)
    refuse_other_rules(engine._config._param_dict.get("tensor_parallel"), record, model)
    note_engine(model, engine)
    model.ds_autotp_parsed = True  # type: ignore[assignment]
    # our guard compares batches at intervals, without pickling them
    if engine.first_dataloader_check is not None:
        engine.first_dataloader_check.remove()
    # still there if deepspeed.initialize was imported before us; ZeRO-3 would read it again and count replicas
    engine.config = {key: value for key, value in engine.config.items() if key != BATCH}
    # DeepSpeed multiplied by the world size; a TP group reads one batch
    engine._config.train_batch_size = (
        engine.train_micro_batch_size_per_gpu() * engine.gradient_accumulation_steps() * mesh.dp_size
    )
    _announce(record, model, engine, options.quiet)


def _announce(record: Sharding, model: nn.Module, engine: DeepSpeedEngine, quiet: bool) -> None:
    """Print a summary and warnings, once a model; a collective call."""
    mesh = record.mesh
    if record in _ANNOUNCED:
        return
    _ANNOUNCED.add(record)
    spanned = mesh.hosts_spanned()
    if not quiet:
        log.info(record.summary(engine.zero_optimization_stage()))
        log.info(_memory(model, engine, mesh.dp_size))
        if record.equalised:
            log.info(
                f"{len(record.equalised)} tensors, such as {record.equalised[0]!r}, differed between ranks (other "
                "seeds, or other files on a host?); all ranks now have those of the first."
            )
    if spanned > 1 and mesh.tp_rank == 0:
        log.warning(
            f"the tensor-parallel group of rank {dist.get_rank()} spans {spanned} hosts; every "
            "layer waits for the network. Choose autotp_size at most the number of GPUs of a host.",
            rank0_only=False,
        )


def _memory(model: nn.Module, engine: DeepSpeedEngine, replicas: int) -> str:
    """Estimate the memory of this rank, without activations; optimizer state is taken to be Adam's."""
    half = engine.bfloat16_enabled() or engine.fp16_enabled()
    stage = engine.zero_optimization_stage()
    sizes = [(math.prod(shard_shape(p)), 2 if half else p.element_size(), p.requires_grad) for p in model.parameters()]
    parameters = sum(numel * size for numel, size, _ in sizes) / (replicas if stage >= 3 else 1)
    gradients = sum(numel * size for numel, size, trained in sizes if trained) / (replicas if stage >= 2 else 1)
    # two moments in float32, and a master copy of half-precision weights
    state = sum(numel * (12 if half else 8) for numel, _, trained in sizes if trained) / (replicas if stage >= 1 else 1)
    offloaded = ", offloaded" if engine.zero_offload_optimizer() is not None else ""
    return (
        f"memory per rank about {_readable(parameters)} parameters, {_readable(gradients)} gradients, "
        f"{_readable(state)} optimizer state (Adam's{offloaded}); activations come on top"
    )


def _readable(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
