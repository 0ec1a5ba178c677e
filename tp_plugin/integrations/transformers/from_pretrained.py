"""``from_pretrained`` that brings only this rank's shards into memory: its entry, and patches of transformers.

Under a live ZeRO-3 config of DeepSpeed with a tensor-parallel degree every ``from_pretrained`` loads this way, and
``from_config`` builds the full model. transformers would partition both over the whole world with ``zero.Init``.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedModel, core_model_loading, modeling_utils
from transformers.integrations import deepspeed as trainer_side

from tp_plugin.config import TensorParallelConfig
from tp_plugin.errors import TensorParallelError, agree, meet, sentence_of
from tp_plugin.integrations.accelerate.degree import degree_in, tp_size_of_launch
from tp_plugin.integrations.features import LOADING
from tp_plugin.integrations.transformers.gguf import advice
from tp_plugin.integrations.transformers.sharded_load import Load
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.mesh import ParallelMesh, take_device
from tp_plugin.sharding.preconditions import quantisation_of

_LOAD: contextvars.ContextVar[Load | None] = contextvars.ContextVar("the load under way", default=None)

UNSERVED = {
    "state_dict": "every rank has the full tensors already",
    "quantization_config": "quantised weights cannot be sharded",
    "device_map": "DeepSpeed moves the shards to their device",
    "distributed_config": "it asks for transformers' own parallelism",
    "tp_plan": "it asks for transformers' own parallelism",
    "tp_size": "it asks for transformers' own parallelism",
    "use_kernels": "the forwards it replaces would bypass sharded layers",
}
"""Options of ``from_pretrained`` that a model loaded by slices cannot have, and why."""
_OWN_PARALLELISM = ("tp_plan", "tp_size", "device_mesh", "distributed_config")
_OTHER_SIZES = ("fsdp_size", "dp_replicate_size", "pp_size", "ep_size")


upstream = Upstream(LOADING)
_SLICES = "each rank reads its slices only"
_CONVERT = ["model", "state_dict", "load_config"]
_TIES, _BIAS = "ties are settled before the plan", "it would crop a new bias"
_ASLEEP = "without it transformers leaves zero.Init alone"
upstream.needs(PreTrainedModel, "tie_weights", ["missing_keys", "recompute_mapping"], _TIES)
upstream.needs(PreTrainedModel, "_adjust_bias", ["output_embeddings", "input_embeddings"], _BIAS)
upstream.needs(
    core_model_loading,
    "convert_and_load_state_dict_in_model",
    _CONVERT,
    "it converts tensors that are not read yet",
    older=([*_CONVERT, "tp_plan"],),
)
upstream.needs(trainer_side, "_hf_deepspeed_config_weak_ref", None, _ASLEEP)
upstream.needs(trainer_side, "is_deepspeed_zero3_enabled", [], "it says whether zero.Init would be used")
upstream.needs(trainer_side, "deepspeed_config", [], "the tensor-parallel degree is read from it")


def load_sharded(call: Callable[[], Any], name: Any, config: TensorParallelConfig) -> Any:
    """Return the result of ``call``, a ``from_pretrained`` of transformers, with its model sharded. A collective call.

    Args:
        call: loads ``name`` once.
        name: a directory or the id of a repository.
        config: ``tp_size`` and options.

    Raises:
        TensorParallelError: on every rank together, before anything is read if the checkpoint does not fit.
    """
    if dist.is_initialized():
        take_device()
        meet("from_pretrained")
    load = Load(name, config, ParallelMesh.create(config.tp_size))
    token = _LOAD.set(load)
    try:
        with zero3_asleep():
            _check_directory(name)
            found = call()
            load.finish(found[0] if isinstance(found, tuple) else found)
        return found
    except Exception as failure:
        if load.agreed:
            raise
        try:
            agree(_sentence(name, failure))  # the other ranks wait for this one's result
        except TensorParallelError as together:
            raise together from failure
        raise
    finally:
        _LOAD.reset(token)
        load.close()


def _check_directory(name: Any) -> None:
    """Raise TensorParallelError unless a name that looks like a directory is one, with a model in it."""
    path = str(name)
    if os.path.isdir(path):
        if not os.listdir(path):
            raise TensorParallelError(f"the directory {path!r} is empty; name that of a saved model.")
        if os.path.exists(os.path.join(path, "adapter_config.json")):
            raise TensorParallelError(
                f"{path!r} is an adapter; load its base model and put the adapter on it with PEFT."
            )
    elif os.path.isabs(path) or path.startswith("."):
        raise TensorParallelError(f"there is no directory {path!r}; name that of a saved model, or a repository.")


def saved_class(name: str, options: Mapping[str, Any]) -> Any:
    """Return the transformers class in a checkpoint's config; the auto class of causal LMs if it has none."""
    import transformers

    _refuse_gguf(name, options)
    config = options.get("config")
    if not isinstance(config, transformers.PreTrainedConfig):
        known = {"trust_remote_code", "revision", "subfolder", "token", "cache_dir", "local_files_only"}
        config = transformers.AutoConfig.from_pretrained(
            config or name, **{key: value for key, value in options.items() if key in known}
        )
    saved = (getattr(config, "architectures", None) or [""])[0]
    if getattr(config, "auto_map", None) and options.get("trust_remote_code"):
        return transformers.AutoModelForCausalLM
    return getattr(transformers, saved, None) or transformers.AutoModelForCausalLM


def _refuse_gguf(name: Any, options: Mapping[str, Any]) -> None:
    if file := options.get("gguf_file"):
        raise TensorParallelError(
            f"the GGUF file {file!s} is quantised and is not read by slices; {advice(name, file)}."
        )


def _sentence(name: Any, failure: Exception) -> str:
    """Describe an error of this rank alone in one sentence."""
    if isinstance(failure, TensorParallelError):
        return str(failure)
    if "trust_remote_code=True" in str(failure):
        return (
            f"{str(name)!r} brings modelling code of its own, which is not run unasked; read it, then pass "
            "trust_remote_code=True (model.trust_remote_code: true in a recipe)."
        )
    return f"cannot load {str(name)!r}: {sentence_of(failure)}."


@upstream.patch(
    PreTrainedModel, "from_pretrained", ["pretrained_model_name_or_path"], f"{_SLICES} under a ZeRO-3 config"
)
def _from_pretrained(original: Callable[..., Any], cls: type, name: Any, *args: Any, **kwargs: Any) -> Any:
    def call() -> Any:
        _refuse_gguf(name, kwargs)
        for option, why in UNSERVED.items():
            if kwargs.get(option):
                raise TensorParallelError(
                    f"{option}= cannot be given for a model of which each rank loads its slices ({why}); leave it out."
                )
        return original(cls, name, *args, **kwargs)

    load = _LOAD.get()
    if load is not None:
        return call() if load.reader is None else original(cls, name, *args, **kwargs)
    config = _live_config()
    known = trainer_side.deepspeed_config()
    _leave_out_same_degree(kwargs, tp_size_of_launch() if known is None else degree_in(known))
    return original(cls, name, *args, **kwargs) if config is None else load_sharded(call, name, config)


def _leave_out_same_degree(options: dict[str, Any], degree: int) -> None:
    """Drop options that ask transformers for the ``degree`` of the DeepSpeed config, with which we shard.

    Programs that offer one key for the degree hand it to both; transformers would shard the model another time.

    Raises:
        TensorParallelError: they ask for another degree, or for a plan that is not the model's own.
    """
    plan, size, mesh, whole = (options.get(name) for name in _OWN_PARALLELISM)
    if whole is not None:
        said = whole if isinstance(whole, Mapping) else vars(whole)
        plan, size = said.get("tp_plan"), said.get("tp_size") or 1
        if any((said.get(other) or 1) > 1 for other in _OTHER_SIZES):
            plan = "with other sizes"
    elif size is None and mesh is not None:
        size = (mesh["tp"] if "tp" in (mesh.mesh_dim_names or ()) else mesh).size()
    if degree == 1 or (plan is None and size is None):
        return
    if plan not in (None, "auto") or size not in (None, degree):
        raise TensorParallelError(
            f"from_pretrained(tp_plan={plan!r}, tp_size={size}) asks transformers for parallelism beside the degree "
            f"{degree} of the DeepSpeed config; give that degree and 'auto', or none."
        )
    for option in _OWN_PARALLELISM:
        options.pop(option, None)


@upstream.patch(PreTrainedModel, "_from_config", ["config"], "under a ZeRO-3 config it would partition over the world")
def _from_config(original: Callable[..., Any], cls: type, config: Any, **kwargs: Any) -> Any:
    with contextlib.nullcontext() if _live_config() is None else zero3_asleep():
        return original(cls, config, **kwargs)


@upstream.patch(
    PreTrainedModel, "_load_pretrained_model", ["model", "state_dict", "checkpoint_files", "load_config"], _SLICES
)
def _load_pretrained_model(
    original: Callable[..., Any], model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, **rest: Any
) -> Any:
    load = _LOAD.get()
    if load is None or load.plan is not None or not set(load.files) <= set(checkpoint_files or ()):
        return original(model, state_dict, checkpoint_files, load_config, **rest)
    return load.fill(model, checkpoint_files, load_config), None


@upstream.patch(
    modeling_utils,
    "_get_resolved_checkpoint_files",
    ["pretrained_model_name_or_path", "variant", "gguf_file", "use_safetensors", "user_agent", "is_remote_code"],
    "one rank a host downloads, all check headers",
)
def _get_resolved_checkpoint_files(
    original: Callable[..., Any], pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
) -> Any:
    load, path = _LOAD.get(), pretrained_model_name_or_path
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


@upstream.patch(
    modeling_utils,
    "get_hf_quantizer",
    ["config", "quantization_config", "device_map", "weights_only", "user_agent"],
    "quantised weights are refused",
)
def _get_hf_quantizer(
    original: Callable[..., Any], config: Any, quantization_config: Any, *args: Any, **kwargs: Any
) -> Any:
    load = _LOAD.get()
    method = None if load is None else quantisation_of(config)
    if load is not None and method:
        raise TensorParallelError(
            f"{load.name!s} is quantised ({method}), and quantised weights cannot be sharded; name the checkpoint it "
            "was made from."
        )
    return original(config, quantization_config, *args, **kwargs)


@upstream.patch(
    modeling_utils,
    "log_state_dict_report",
    ["model", "pretrained_model_name_or_path", "ignore_mismatched_sizes", "loading_info"],
    "one rank reports what was missing",
)
def _log_state_dict_report(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    # all ranks together have raised before for anything that it would raise
    if _LOAD.get() is None or not dist.is_initialized() or dist.get_rank() == 0:
        original(*args, **kwargs)


# ---- ZeRO-3 ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def zero3_asleep() -> Iterator[None]:
    """While open, transformers builds and loads models as it does without ZeRO-3."""
    known = trainer_side._hf_deepspeed_config_weak_ref
    trainer_side._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        trainer_side._hf_deepspeed_config_weak_ref = known


def _live_config() -> TensorParallelConfig | None:
    """Return our options if transformers would partition a new model with ``zero.Init`` although tp is above 1."""
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
