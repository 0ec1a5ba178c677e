"""Adapters loaded into a sharded model through PEFT, whose adapters take full tensors.

transformers' own loader replaces each parameter that it loads by a new one, which would have no layout.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from peft import PeftConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils import save_and_load
from peft.utils.save_and_load import load_peft_weights
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from tp_plugin.errors import TensorParallelError, agree, sentence_of
from tp_plugin.integrations.features import SAVED_ADAPTERS
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.sharding import state_of
from tp_plugin.sharding.full_tensors import NO_ASSIGN

upstream = Upstream(SAVED_ADAPTERS)
_READ = "every rank reads an adapter before any puts it into a sharded model"
upstream.needs(PeftModel, "_split_kwargs", ["kwargs"], _READ)


@upstream.patch(PeftAdapterMixin, "load_adapter", ["peft_model_id", "adapter_name"], "a sharded model takes its shards")
def _load_adapter_of_transformers(
    original: Callable[..., Any],
    self: Any,
    peft_model_id: str | None = None,
    adapter_name: str | None = None,
    *args: Any,
    **options: Any,
) -> Any:
    if state_of(self) is None:
        return original(self, peft_model_id, adapter_name, *args, **options)
    config, state = options.pop("peft_config", None), options.pop("adapter_state_dict", None)
    trained = options.pop("is_trainable", False)
    unknown = {name for name, value in options.items() if value not in (None, "auto", False)}
    given = config is not None and state is not None
    if args or unknown or (peft_model_id is None and not given):
        raise TensorParallelError(
            "load_adapter on a sharded model takes a directory or repository (or peft_config and adapter_state_dict), "
            "adapter_name and is_trainable by name; load with other options before sharding."
        )
    where: Any = peft_model_id
    error = None
    try:
        config = PeftConfig.from_pretrained(where) if config is None else config
        state = load_peft_weights(where) if state is None else state
    except Exception as failure:  # any exception must reach every rank: injecting is a collective call
        error = _sentence(where, failure)
    agree(error)
    config.inference_mode = not trained
    name = adapter_name or "default"
    inject_adapter_in_model(config, self, name)
    self._hf_peft_config_loaded = True
    found: Any = set_peft_model_state_dict(self, state, name)
    missing = [key for key in found.missing_keys if f".{name}." in key or key.endswith(f".{name}")]
    if missing or found.unexpected_keys:
        error = (
            f"the adapter {peft_model_id or name!r} does not fit the model: missing {missing[:3]}, unexpected "
            f"{found.unexpected_keys[:3]}."
        )
    agree(error)
    return found


@upstream.patch(PeftModel, "from_pretrained", ["model", "model_id"], _READ)
def _from_pretrained(
    original: Callable[..., Any], cls: type[PeftModel], model: nn.Module, model_id: Any, *args: Any, **options: Any
) -> Any:
    """Check options and files first: PEFT injects the adapter between reading its config and its weights."""
    if state_of(model) is not None:
        call = inspect.signature(original).bind(cls, model, model_id, *args, **options)
        agree(_unsupported(call) or _unreadable(model_id, options))
    return original(cls, model, model_id, *args, **options)


@upstream.patch(PeftModel, "load_adapter", ["model_id", "adapter_name"], _READ)
def _load_adapter(
    original: Callable[..., Any], self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **options: Any
) -> Any:
    if state_of(self) is not None:
        error = _unsupported(inspect.signature(original).bind(self, model_id, adapter_name, *args, **options))
        if error is None and adapter_name not in self.peft_config:
            error = _unreadable(model_id, options)
        agree(error)
    return original(self, model_id, adapter_name, *args, **options)


@upstream.patch(
    save_and_load,
    "_find_mismatched_keys",
    ["model", "peft_model_state_dict", "ignore_mismatched_sizes"],
    "it would compare full tensors with shards",
)
def _find_mismatched_keys(
    original: Callable[..., Any], model: nn.Module, state: dict, ignore_mismatched_sizes: bool = False
) -> Any:
    if ignore_mismatched_sizes and state_of(model) is not None:
        raise TensorParallelError(_MISMATCHED)
    return original(model, state, ignore_mismatched_sizes)


_MISMATCHED = (
    "ignore_mismatched_sizes=True compares the adapter's full tensors with this rank's shards and would leave "
    "them out; load with it before sharding."
)


def _unsupported(call: inspect.BoundArguments) -> str | None:
    given = {**call.arguments, **call.arguments.get("kwargs", {})}
    if given.get("low_cpu_mem_usage"):
        return NO_ASSIGN
    return _MISMATCHED if given.get("ignore_mismatched_sizes") else None


def _unreadable(where: Any, options: dict[str, Any]) -> str | None:
    """Return an error if this rank cannot read the adapter's config and weights; None if it can."""
    try:
        of_hub, _ = PeftModel._split_kwargs(options)
        if options.get("config") is None:
            PeftConfig.from_pretrained(where, **of_hub)
        load_peft_weights(where, device="cpu", **of_hub)
    except Exception as failure:
        return _sentence(where, failure)
    return None


def _sentence(where: Any, failure: Exception) -> str:
    return f"reading the adapter {str(where)!r} failed: {sentence_of(failure)}."
