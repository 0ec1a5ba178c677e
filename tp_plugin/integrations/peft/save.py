"""Adapters of a sharded model saved in PEFT's own format, with full shapes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import Trainer

from tp_plugin.errors import TensorParallelError, agree, meet
from tp_plugin.integrations.contract import Patches, contract
from tp_plugin.integrations.transformers.export import Written, collects_nothing, from_first, nothing_here
from tp_plugin.sharding import state_of
from tp_plugin.weights.gather import gathered, refuse_shards, unwrapped
from tp_plugin.weights.staging import Staging
from tp_plugin.weights.stream import persistent


def check_contracts() -> None:
    """See :func:`tp_plugin.integrations.peft.check_contracts`."""
    contract(PeftModel, "save_pretrained", ["save_directory"], "adapters are saved with full shapes")
    contract(PeftModel, "get_prompt_embedding_to_save", ["adapter_name"], "a prompt is computed on every rank")
    contract(Trainer, "save_model", ["output_dir", "_internal_call"], "adapters alone are gathered for it")


def install(patches: Patches) -> None:
    """Lay the patches; models that are not sharded are saved as ever."""
    patches.replace(PeftModel, "save_pretrained", _save_pretrained_method)
    patches.replace(Trainer, "save_model", _save_model_method)


def save_adapters(model_or_engine: nn.Module | Any, directory: str | Path, **options: Any) -> None:
    """Write the adapters of a ``PeftModel`` as PEFT does, for one process to load. A collective call.

    Args:
        model_or_engine: the sharded ``PeftModel``, or an engine around it.
        directory: created if missing; an adapter there is replaced when the new one is complete.
        options: of ``PeftModel.save_pretrained``: ``selected_adapters``, ``save_embedding_layers``.

    Raises:
        TensorParallelError: on every rank, when writing failed.
    """
    model: Any = unwrapped(model_or_engine)
    meet("save_pretrained")
    if options.pop("push_to_hub", False):
        agree("adapters are not pushed to the hub while they are saved; upload the directory afterwards.")
    for given in ("is_main_process", "state_dict"):
        options.pop(given, None)
    first = not dist.is_initialized() or dist.get_rank() == 0
    everything, names = persistent(model), list[str]()
    error: str | None = None
    with _prompts_held(model, options):
        if first:
            try:
                names = _saved(model, everything, options)
            except Exception as failure:  # whatever it was, every rank must learn of it
                error = f"saving the adapters failed: {type(failure).__name__}: {failure}"
        names, error = from_first((names, error))
        agree(error)
        try:
            state = gathered(model_or_engine, {name: everything[name] for name in names})
            if first:
                _write(model, Path(directory), state, options)
        except Exception as failure:
            error = f"writing {str(directory)!r} failed: {type(failure).__name__}: {failure}"
    agree(error)


_ORIGINAL = PeftModel.save_pretrained


def _write(model: Any, directory: Path, state: dict[str, Any], options: dict[str, Any]) -> None:
    with Staging(directory) as staging:
        _ORIGINAL(model, str(staging.path), state_dict=state, **options)
        staging.move_in()


@contextlib.contextmanager
def _prompts_held(model: Any, options: Mapping[str, Any]) -> Iterator[None]:
    """Prompts are computed on every rank, which ZeRO-3 asks for; while open, PEFT on one rank takes those."""
    configs = model.peft_config
    chosen = [name for name in options.get("selected_adapters") or configs if name in configs]
    prompts = {}
    for name in chosen:
        if not configs[name].is_prompt_learning:
            continue
        if configs[name].inference_mode and any(hasattr(p, "ds_id") for p in model.prompt_encoder[name].parameters()):
            raise TensorParallelError(
                f"the prompt of adapter {name!r} is loaded for inference and partitioned by ZeRO-3, where PEFT cannot "
                "save it; load it with is_trainable=True."
            )
        prompts[name] = model.get_prompt_embedding_to_save(name)
    if not prompts:
        yield
        return
    model.get_prompt_embedding_to_save = prompts.__getitem__
    try:
        yield
    finally:
        del model.get_prompt_embedding_to_save


def _saved(model: Any, everything: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """Names of what in the model PEFT would write; it may ask the Hub for that, which ranks could hear differently."""
    asked = {name: options[name] for name in ("save_embedding_layers",) if name in options}
    taken: set[int] = set()
    for adapter in options.get("selected_adapters") or list(model.peft_config):
        found = get_peft_model_state_dict(model, state_dict=dict(everything), adapter_name=adapter, **asked)
        taken |= {id(tensor) for tensor in found.values()}
    return [name for name, tensor in everything.items() if id(tensor) in taken]


def _save_pretrained_method(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save_pretrained(self: PeftModel, save_directory: str, *args: Any, **options: Any) -> None:
        state = options.get("state_dict")
        if isinstance(state, Written):
            return
        if state_of(self) is None:
            original(self, save_directory, *args, **options)
        elif state is not None:
            if nothing_here(state, options.get("is_main_process", True)):
                return
            refuse_shards(self, state)
            original(self, save_directory, *args, **options)
        elif (
            args
            or options.get("path_initial_model_for_weight_conversion")
            or not options.pop("safe_serialization", True)
        ):
            raise TensorParallelError(
                "save_pretrained of a sharded PeftModel writes safetensors and takes its options by name, and "
                "path_initial_model_for_weight_conversion not at all; convert the adapter after it is saved."
            )
        else:
            save_adapters(self, save_directory, **options)

    return save_pretrained


def _save_model_method(original: Callable[..., Any]) -> Callable[..., Any]:
    """Trainer would gather the full model on rank 0 to write its adapters."""

    @functools.wraps(original)
    def save_model(self: Trainer, output_dir: str | None = None, _internal_call: bool = False) -> None:
        model = unwrapped(self.model)
        if state_of(model) is None or not isinstance(model, PeftModel):
            original(self, output_dir, _internal_call)
            return
        save_adapters(self.model_wrapped, output_dir or self.args.output_dir or ".")
        with collects_nothing(self):
            original(self, output_dir, _internal_call)

    return save_model
