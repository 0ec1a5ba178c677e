"""Adapters of a sharded model saved in PEFT's own format, with full shapes."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from tp_plugin.errors import TensorParallelError, agree, failing_together, meet
from tp_plugin.integrations.features import SAVED_ADAPTERS
from tp_plugin.integrations.transformers.export import from_first, nothing_here
from tp_plugin.integrations.transformers.trainer_save import Written, at_hand, placed, register_writer
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.partitioned import has_partitioned
from tp_plugin.sharding import state_of
from tp_plugin.weights.gather import gathered, refuse_shards, unwrapped
from tp_plugin.weights.staging import Staging
from tp_plugin.weights.stream import persistent

upstream = Upstream(SAVED_ADAPTERS)
upstream.needs(PeftModel, "get_prompt_embedding_to_save", ["adapter_name"], "a prompt is computed on every rank")


def save_adapters(model_or_engine: nn.Module | Any, directory: str | Path, **options: Any) -> None:
    """Write the adapters of a ``PeftModel`` in PEFT's format, with full shapes. A collective call.

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
    with _prompts_of_every_rank(model, options):
        if first:
            try:
                names = _saved(model, everything, options)
            except Exception as failure:  # any exception must reach every rank
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
def _prompts_of_every_rank(model: Any, options: Mapping[str, Any]) -> Iterator[None]:
    """Compute prompts on every rank, as ZeRO-3 needs; while open, PEFT on one rank uses them."""
    configs = model.peft_config
    chosen = [name for name in options.get("selected_adapters") or configs if name in configs]
    prompts = {}
    for name in chosen:
        if not configs[name].is_prompt_learning:
            continue
        if configs[name].inference_mode and has_partitioned(model.prompt_encoder[name]):
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
    """Return the names that PEFT would write. PEFT may ask the Hub, whose answers could differ between ranks."""
    asked = {name: options[name] for name in ("save_embedding_layers",) if name in options}
    taken: set[int] = set()
    for adapter in options.get("selected_adapters") or list(model.peft_config):
        found = get_peft_model_state_dict(model, state_dict=dict(everything), adapter_name=adapter, **asked)
        taken |= {id(tensor) for tensor in found.values()}
    return [name for name, tensor in everything.items() if id(tensor) in taken]


@upstream.patch(PeftModel, "save_pretrained", ["save_directory"], "adapters are saved with full shapes")
def _save_pretrained(
    original: Callable[..., Any], self: PeftModel, save_directory: str, *args: Any, **options: Any
) -> None:
    state = options.get("state_dict")
    if isinstance(state, Written):
        return
    if state is None and (state := at_hand(self)) is not None:
        options["state_dict"] = state
    if state_of(self) is None:
        original(self, save_directory, *args, **options)
    elif state is not None:
        if nothing_here(state, options.get("is_main_process", True)):
            return
        refuse_shards(self, state, self.peft_config)
        original(self, save_directory, *args, **options)
    elif args or options.get("path_initial_model_for_weight_conversion") or not options.pop("safe_serialization", True):
        raise TensorParallelError(
            "save_pretrained of a sharded PeftModel writes safetensors and takes its options by name, without "
            "path_initial_model_for_weight_conversion; convert the adapter after it is saved."
        )
    else:
        save_adapters(self, save_directory, **options)


@upstream.patch(PeftModel, "push_to_hub", ["repo_id"], "every rank would upload an adapter")
def _push_to_hub(original: Callable[..., Any], self: PeftModel, repo_id: str, **options: Any) -> Any:
    """Save by all ranks together; rank 0 uploads as PEFT does."""
    if state_of(self) is None:
        return original(self, repo_id, **options)
    with contextlib.ExitStack() as stack:
        with failing_together():
            directory = stack.enter_context(tempfile.TemporaryDirectory())
        save_adapters(self, directory)  # rank 0's is used

        def copied(target: str, **_options: Any) -> None:
            shutil.copytree(directory, target, dirs_exist_ok=True)

        with failing_together():
            if not dist.is_initialized() or dist.get_rank() == 0:
                stack.enter_context(placed(self, "save_pretrained", copied))
                return original(self, repo_id, **options)
    return f"https://huggingface.co/{repo_id}"


register_writer(PeftModel, save_adapters)  # Trainer would gather the full model on rank 0
