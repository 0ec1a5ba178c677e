"""Keys of a DeepSpeed config: the ``tensor_parallel`` block, and ``train_batch_size`` beside tensor parallelism.

Keys of AutoTP's block are honoured by our layers or refused. A rule of AutoTP's (``partition_config``,
``preset_model``) is honoured where our plan does the same.

A step trains micro batch x accumulation x data-parallel replicas. DeepSpeed multiplies by all ranks, unless ``mpu=``
tells it the replicas; so do transformers where it fills in "auto", and OpenRLHF. Accelerate fills in the product with
the ranks of its data loaders, which are replicas here.
"""

from __future__ import annotations

import base64
import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.tensor_parallel import config as autotp
from torch import nn

from tp_plugin import log
from tp_plugin.errors import TensorParallelError, reason_of
from tp_plugin.integrations.features import SLOT
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.plans import plan as p
from tp_plugin.sharding import Sharding

upstream = Upstream(SLOT)
_WHY = "unknown keys of tensor_parallel are refused by its fields, and rules compared with our plan"
upstream.needs(autotp, "TPTrainingConfig", None, _WHY)
upstream.needs(autotp.TPTrainingConfig, "get_partition_config_object", [], _WHY, since="0.18.6")
_INIT, _READ = "deepspeed.runtime.tensor_parallel.init_utils", "a config given as a file is read as DeepSpeed reads it"
_RECORDED = "tp_model_init leaves the degree there for initialize()"
upstream.needs(_INIT, "_TP_MODEL_INIT_ARGS", None, _RECORDED, since="0.18.6")
upstream.needs(_INIT, "load_ds_config", ["config"], _READ, since="0.18.6")
try:
    from deepspeed.runtime.tensor_parallel import init_utils
except ImportError:  # before 0.18.6: tp_model_init shards the model itself and records nothing
    init_utils = None

BATCH, MICRO, ACCUMULATION = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
TRIPWIRE = "tp_plugin.register()"
"""Part of a rule that makes DeepSpeed's own AutoTP fail with our name; we ignore the rule."""
_STYLES = {
    "column": (p.COLUMN, p.COLUMN_GATHER, p.VOCAB_HEAD, p.VOCAB_EMBEDDING),
    "row": (p.ROW, p.ROW_SPLIT),
    "skip": (p.REPLICATED, p.PARTIAL, p.ENTER, p.LATENT),
}
_WITHOUT_EFFECT: dict[str, tuple[tuple[Any, ...], str]] = {
    "tp_overlap_comm": ((None, False), "its layers do not overlap their collectives with computation; remove it"),
    "vocab_parallel_lm_head": (
        (None, True),
        "the head is sharded by its plan; remove it, or replicate the head by "
        '"tp_plugin": {"plan": {"lm_head": "replicated"}}',
    ),
    "vocab_parallel_ce_backend": ((None, "torch"), "the loss over a sharded vocabulary is its own; remove it"),
    "keep_module_on_host": ((None, False), "models are sharded on their device; remove it"),
    "replace_with_kernel_inject": ((None, False), "no kernels are injected; remove it"),
    "kernel_inject": ((None, False), "no kernels are injected; remove it"),
    "injection_policy_tuple": ((None,), "modules are replaced by its plan; remove it"),
}
"""Keys that have an effect in DeepSpeed, the values of each that we honour, and the fix for any other value."""


def with_recorded(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config, completed with the arguments of ``deepspeed.tp_model_init`` as ``deepspeed.initialize`` does."""
    recorded, section = recorded_arguments(), config.get("tensor_parallel") or {}
    if recorded is None or not isinstance(section, Mapping) or section.get("autotp_size") is not None:
        return dict(config)
    return dict(config) | {"tensor_parallel": dict(section) | {"autotp_size": recorded["tp_size"]}}


def given_group(section: Any) -> Any:
    """The tensor-parallel group passed to ``deepspeed.tp_model_init`` or set in the config; None without one."""
    inner = section.get("tp", section.get("tensor_parallel")) if isinstance(section, Mapping) else None
    in_config = inner.get("tp_group") if isinstance(inner, Mapping) else None
    return (recorded_arguments() or {}).get("tp_group") or in_config


def recorded_arguments() -> dict[str, Any] | None:
    """Arguments of ``deepspeed.tp_model_init`` that DeepSpeed has recorded in this process; None without a call."""
    return None if init_utils is None else init_utils._TP_MODEL_INIT_ARGS


def shards_at_once() -> bool:
    """Return True if ``deepspeed.tp_model_init`` shards a model by AutoTP at once, before an engine exists."""
    return init_utils is None


def read_config(given: str | dict[str, Any]) -> dict[str, Any]:
    """A config as DeepSpeed reads it: a dict, the path of a file, or base64."""
    if isinstance(given, dict):
        return given
    if init_utils is not None:
        return init_utils.load_ds_config(given)
    import hjson

    return hjson.loads(Path(given).read_text() if os.path.exists(given) else base64.urlsafe_b64decode(given).decode())


def without_tripwire(config: dict[str, Any]) -> dict[str, Any]:
    """The config without our tripwire where DeepSpeed knows no rules and refuses their key (before 0.18.6)."""
    section = config.get("tensor_parallel")
    if "partition_config" in autotp.TPTrainingConfig.model_fields or not isinstance(section, Mapping):
        return config
    rules = section.get("partition_config")
    if not isinstance(rules, Mapping) or _without_our_rule(rules) is not None:
        return config
    return {**config, "tensor_parallel": {key: section[key] for key in section if key != "partition_config"}}


def refuse_section(section: Any) -> None:
    """Raise TensorParallelError for a key of ``tensor_parallel`` that is unknown, or that we would ignore."""
    if not isinstance(section, Mapping):
        return  # refused where the degree is read
    section = without_tripwire({"tensor_parallel": section})["tensor_parallel"]
    fields = autotp.TPTrainingConfig.model_fields
    known = {*fields, *(field.alias for field in fields.values() if field.alias)}
    unknown = [key for key in section if key not in known]
    if unknown:
        guess = next((n for n in section.values() if isinstance(n, int) and not isinstance(n, bool) and n > 1), "N")
        raise TensorParallelError(
            f"tensor_parallel in the DeepSpeed config knows no {' and no '.join(map(repr, unknown))}; the degree is "
            f'"tensor_parallel": {{"autotp_size": {guess}}}, and our other options are keys of the tp_plugin block.'
        )
    for key, (honoured, remedy) in _WITHOUT_EFFECT.items():
        if key in section and section[key] not in honoured:
            raise TensorParallelError(
                f"tensor_parallel.{key} is {section[key]!r} in the DeepSpeed config and tp_plugin does not honour it: "
                f"{remedy}."
            )
    _refuse_inner(section)
    _rules(section)  # raises if they cannot be read


def _refuse_inner(section: Mapping[str, Any]) -> None:
    inner = section.get("tp", section.get("tensor_parallel"))
    if not isinstance(inner, Mapping):
        return
    size, outer = inner.get("tp_size", 1), section.get("autotp_size", 0)
    if size not in (1, outer):
        raise TensorParallelError(
            f"tensor_parallel.tp.tp_size is {size!r} and tensor_parallel.autotp_size is {outer!r} in the DeepSpeed "
            f"config; the degree of a training is autotp_size alone: remove tp.tp_size."
        )
    for key, honoured in (("tp_grain_size", 1), ("mpu", None)):
        if inner.get(key, honoured) != honoured:
            raise TensorParallelError(
                f"tensor_parallel.tp.{key} in the DeepSpeed config is not honoured by tp_plugin; remove it."
            )


def _without_our_rule(rules: Mapping[str, Any]) -> dict[str, Any] | None:
    specs = [spec for spec in rules.get("layer_specs", ()) if TRIPWIRE not in str(spec.get("partition_type"))]
    return {**rules, "layer_specs": specs} if specs else None


def _rules(section: Mapping[str, Any]) -> Any:
    """AutoTP's object of the rules in a config, without our tripwire; None without rules."""
    given, preset = section.get("partition_config"), section.get("preset_model")
    if isinstance(given, Mapping):
        given = _without_our_rule(given)
    if not given and not preset:
        return None
    try:
        read = autotp.TPTrainingConfig(partition_config=given, preset_model=preset).get_partition_config_object()
    except Exception as failure:  # pydantic's errors, or those of AutoTP's reader on a malformed rule
        raise TensorParallelError(
            f"tensor_parallel.partition_config in the DeepSpeed config cannot be read ({reason_of(failure)}); correct "
            "or remove it."
        ) from failure
    if read is None:
        raise TensorParallelError(
            f"tensor_parallel.preset_model {preset!r} in the DeepSpeed config is none of DeepSpeed's presets; remove "
            "it: tp_plugin needs no preset."
        )
    return read


def refuse_other_rules(section: Any, record: Sharding, model: nn.Module) -> None:
    """Raise TensorParallelError where a rule of ``partition_config`` or of a preset differs from our plan.

    Sub-tensors that a rule describes by ``shape`` are not compared: the plan knows how a weight is packed, and any
    way to shard it gives the result of one process.
    """
    rules = _rules(section) if isinstance(section, Mapping) else None
    if rules is None:
        return
    kind = getattr(getattr(model, "config", None), "model_type", None)
    styles = dict.fromkeys(record.plan.replicated, p.REPLICATED)
    styles |= {f"{name}.weight": placement.style for name, placement in record.plan.placements.items()}
    for name, style in styles.items():
        spec = rules.find_matching_spec(name, kind) if len(record.shapes.get(name, (0, 0))) > 1 else None
        if spec is not None and style not in _STYLES[spec.partition_type.value]:
            raise TensorParallelError(
                f"tensor_parallel.partition_config or preset_model makes {name} {spec.partition_type.value!r} and "
                f"tp_plugin's plan makes it {style!r}; remove the rule, or move it to 'plan' of the tp_plugin block."
            )


# ---- train_batch_size ------------------------------------------------------------------------------------------------


def settled(config: Mapping[str, Any], tp: int, by_replicas: bool) -> dict[str, Any]:
    """The config without ``train_batch_size``: micro batch and accumulation imply it at every ZeRO stage.

    At stage 3 DeepSpeed reads the config a second time, with the number of replicas.

    Args:
        config: a DeepSpeed config; it is not changed.
        tp: ranks of a tensor-parallel group; the world is a multiple of it.
        by_replicas: ``mpu=`` was passed, so DeepSpeed counts data-parallel replicas, not ranks.

    Raises:
        TensorParallelError: a size is still "auto", is no number, or is neither of the two products.
    """
    for key in (BATCH, MICRO, ACCUMULATION):
        _refuse_no_number(key, config.get(key))
    rest = {key: value for key, value in config.items() if key != BATCH}
    batch, micro, accumulation = (config.get(key) for key in (BATCH, MICRO, ACCUMULATION))
    if batch is None:
        return rest
    ranks = dist.get_world_size()
    replicas = ranks // tp
    if micro is not None and accumulation is not None:
        product = micro * accumulation
        if batch not in (product * ranks, product * replicas):
            raise TensorParallelError(
                f"{BATCH} {batch} in the DeepSpeed config does not match {MICRO} {micro} x {ACCUMULATION} "
                f"{accumulation}: these make {product * replicas} over {replicas} replicas (a step) and "
                f"{product * ranks} over {ranks} ranks (as DeepSpeed counts); remove it or correct one of the three."
            )
        return rest
    known = micro or accumulation or 1
    counted = known * (replicas if by_replicas else ranks)
    wanted = ACCUMULATION if micro else MICRO
    if batch % counted:
        given = f" over {MICRO} {micro}" if micro else f" over {ACCUMULATION} {accumulation}" if accumulation else ""
        raise TensorParallelError(
            f"{BATCH} {batch} in the DeepSpeed config has two readings under tensor parallelism{given}: {wanted} "
            f"{_quotient(batch, known * ranks)} if all {ranks} ranks share it, as DeepSpeed counts, or "
            f"{_quotient(batch, known * replicas)} if the {replicas} replicas do; remove {BATCH} and set {MICRO} and "
            f"{ACCUMULATION}."
        )
    micro, accumulation = (micro, batch // counted) if micro else (batch // counted, known)
    rest |= {MICRO: micro, ACCUMULATION: accumulation}
    if not by_replicas:
        log.info(
            f"{BATCH} {batch} counts all {ranks} ranks, as DeepSpeed's AutoTP does: a step trains "
            f"{micro * accumulation * replicas} samples ({MICRO} {micro} x {ACCUMULATION} {accumulation} x {replicas} "
            "replicas)."
        )
    return rest


def settle(arguments: dict[str, Any], config: Mapping[str, Any], tp: int) -> None:
    """Replace the config in ``arguments`` of ``deepspeed.initialize`` by the settled one if it has a train_batch_size.

    The caller's own config, which later engines may be made from, is not changed.
    """
    rest = settled(config, tp, by_replicas=arguments.get("mpu") is not None)
    if config.get(BATCH) is not None:
        put_config(arguments, rest)


def put_config(arguments: dict[str, Any], config: Mapping[str, Any]) -> None:
    """Replace the config in ``arguments`` of ``deepspeed.initialize``, wherever the caller has given it."""
    if getattr(arguments.get("args"), "deepspeed_config", None) is not None:
        given = arguments["args"]
        if hasattr(given, "local_rank") and "LOCAL_RANK" in os.environ and given.local_rank in (None, -1):
            given.local_rank = int(os.environ["LOCAL_RANK"])  # DeepSpeed would set it in the copy only
        arguments["args"] = copy.copy(given)
        arguments["args"].deepspeed_config = None
    arguments.pop("config_params", None)
    arguments["config"] = dict(config)


def _refuse_no_number(key: str, value: Any) -> None:
    if value == "auto":
        raise TensorParallelError(
            f'{key} in the DeepSpeed config is still "auto", which Trainer and Accelerator.prepare fill in; write a '
            "number, or leave it out."
        )
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise TensorParallelError(f"{key} in the DeepSpeed config must be a whole number above 0, got {value!r}.")


def _quotient(batch: int, by: int) -> str:
    return str(batch // by) if batch % by == 0 else f"{batch}/{by}"
