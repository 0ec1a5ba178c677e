"""The patches through which ``from_pretrained`` brings only this rank's shards into memory, see ``load.py``.

Under a live ZeRO-3 config of DeepSpeed with a tensor-parallel degree every ``from_pretrained`` is loaded so, and
``from_config`` builds the whole model: transformers would partition either over the whole world, with ``zero.Init``.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedModel, core_model_loading, modeling_utils
from transformers.integrations import deepspeed as trainer_side

from tp_plugin.config import TensorParallelConfig
from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.contract import Patches, contract
from tp_plugin.integrations.transformers.load import current, load_sharded, zero3_asleep

UNSERVED = {
    "state_dict": "it is whole on every rank already",
    "gguf_file": "such a file is quantised",
    "quantization_config": "quantised weights cannot be sharded",
    "device_map": "DeepSpeed moves the shards to their device",
    "distributed_config": "it asks for transformers' own parallelism",
    "tp_plan": "it asks for transformers' own parallelism",
    "tp_size": "it asks for transformers' own parallelism",
    "use_kernels": "the forwards it replaces would bypass sharded layers",
}
"""Options of ``from_pretrained`` that a model loaded by slices cannot have, and why."""


def check_contracts() -> None:
    why = "each rank reads its slices only"
    contract(PreTrainedModel, "from_pretrained", ["pretrained_model_name_or_path"], f"{why} under a ZeRO-3 config")
    contract(PreTrainedModel, "_from_config", ["config"], "under a ZeRO-3 config it would partition over the world")
    load = ["model", "state_dict", "checkpoint_files", "load_config"]
    contract(PreTrainedModel, "_load_pretrained_model", load, why)
    contract(PreTrainedModel, "tie_weights", ["missing_keys", "recompute_mapping"], "ties are settled before the plan")
    contract(PreTrainedModel, "_adjust_bias", ["output_embeddings", "input_embeddings"], "it would crop a new bias")
    files = ["pretrained_model_name_or_path", "variant", "gguf_file", "use_safetensors", "user_agent", "is_remote_code"]
    contract(modeling_utils, "_get_resolved_checkpoint_files", files, "one rank a host downloads, all check headers")
    quantised = ["config", "quantization_config", "device_map", "weights_only", "user_agent"]
    contract(modeling_utils, "get_hf_quantizer", quantised, "quantised weights are refused")
    report = ["model", "pretrained_model_name_or_path", "ignore_mismatched_sizes", "loading_info"]
    contract(modeling_utils, "log_state_dict_report", report, "one rank reports what was missing")
    convert = ["model", "state_dict", "load_config"]
    contract(core_model_loading, "convert_and_load_state_dict_in_model", convert, "it converts what has not been read")
    contract(trainer_side, "_hf_deepspeed_config_weak_ref", None, "without it transformers leaves zero.Init alone")
    contract(trainer_side, "is_deepspeed_zero3_enabled", [], "it says whether zero.Init would be used")
    contract(trainer_side, "deepspeed_config", [], "the tensor-parallel degree is read from it")


def install(patches: Patches) -> None:
    patches.replace(PreTrainedModel, "from_pretrained", _from_pretrained_method)
    patches.replace(PreTrainedModel, "_from_config", _from_config_method)
    patches.replace(PreTrainedModel, "_load_pretrained_model", _load_pretrained_model_method)
    patches.replace(modeling_utils, "_get_resolved_checkpoint_files", _get_resolved_checkpoint_files_function)
    patches.replace(modeling_utils, "get_hf_quantizer", _get_hf_quantizer_function)
    patches.replace(modeling_utils, "log_state_dict_report", _log_state_dict_report_function)


def _from_pretrained_method(original: classmethod) -> classmethod:
    inner = original.__func__

    @functools.wraps(inner)
    def from_pretrained(cls: type, name: Any, *args: Any, **kwargs: Any) -> Any:
        def call() -> Any:
            for option, why in UNSERVED.items():
                if kwargs.get(option):
                    raise TensorParallelError(
                        f"{option}= cannot be given for a model of which each rank loads its slices ({why}); leave it "
                        "out."
                    )
            return inner(cls, name, *args, **kwargs)

        load = current()
        if load is not None:
            return call() if load.reader is None else inner(cls, name, *args, **kwargs)
        config = _live_config()
        return inner(cls, name, *args, **kwargs) if config is None else load_sharded(call, name, config)

    return classmethod(from_pretrained)


def _from_config_method(original: classmethod) -> classmethod:
    inner = original.__func__

    @functools.wraps(inner)
    def _from_config(cls: type, config: Any, **kwargs: Any) -> Any:
        with contextlib.nullcontext() if _live_config() is None else zero3_asleep():
            return inner(cls, config, **kwargs)

    return classmethod(_from_config)


def _load_pretrained_model_method(original: staticmethod) -> staticmethod:
    inner = original.__func__

    @functools.wraps(inner)
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, **rest: Any
    ) -> Any:
        load = current()
        if load is None or load.plan is not None or not set(load.files) <= set(checkpoint_files or ()):
            return inner(model, state_dict, checkpoint_files, load_config, **rest)
        return load.fill(model, checkpoint_files, load_config), None

    return staticmethod(_load_pretrained_model)


def _get_resolved_checkpoint_files_function(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _get_resolved_checkpoint_files(pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        load, path = current(), pretrained_model_name_or_path
        if load is None or load.reader is not None:
            return original(path, *args, **kwargs)
        if os.path.isdir(path) or os.environ.get("LOCAL_RANK", "0") == "0":
            found = original(path, *args, **kwargs)
            load.meet()
        else:
            load.meet()  # then the host's first rank has downloaded it
            found = original(path, *args, **kwargs)
        files, metadata = found
        load.open(files, (metadata or {}).get("weight_map"))
        return found

    return _get_resolved_checkpoint_files


def _get_hf_quantizer_function(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_hf_quantizer(config: Any, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
        load = current()
        if load is not None and getattr(config, "quantization_config", None):
            method = config.quantization_config
            method = method.get("quant_method") if isinstance(method, dict) else method.quant_method
            raise TensorParallelError(
                f"{load.name!s} is quantised ({method}), and quantised weights cannot be sharded; name the "
                "checkpoint it was made from."
            )
        return original(config, quantization_config, *args, **kwargs)

    return get_hf_quantizer


def _log_state_dict_report_function(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def log_state_dict_report(*args: Any, **kwargs: Any) -> None:
        # what it would raise for has been raised by then, on all ranks together
        if current() is None or not dist.is_initialized() or dist.get_rank() == 0:
            original(*args, **kwargs)

    return log_state_dict_report


def _live_config() -> TensorParallelConfig | None:
    """Our options, if transformers would partition a model it builds now with ``zero.Init`` though tp is above 1."""
    if not trainer_side.is_deepspeed_zero3_enabled():
        return None
    from tp_plugin.integrations.deepspeed.slot import options_of

    config = options_of(trainer_side.deepspeed_config())
    if config.tp_size == 1:
        return None
    if not dist.is_initialized() and {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        import deepspeed  # zero.Init would do it here too

        deepspeed.init_distributed()
    return config
