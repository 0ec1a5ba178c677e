"""transformers' ``model.load_adapter`` on a sharded model: by way of PEFT, into whose adapters full tensors go.

transformers' own loader puts a new parameter into the place of each it loads, which would know nothing of shards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from transformers.integrations.peft import PeftAdapterMixin

from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.contract import Patches, contract
from tp_plugin.sharding import state_of


def check_contracts() -> None:
    """See :func:`tp_plugin.integrations.peft.check_contracts`."""
    contract(PeftAdapterMixin, "load_adapter", ["peft_model_id", "adapter_name"], "a sharded model takes its shards")


def install(patches: Patches) -> None:
    """Lay the patch; models that are not sharded load adapters as ever."""
    patches.replace(PeftAdapterMixin, "load_adapter", _load_adapter_method)


def _load_adapter_method(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_adapter(
        self: Any, peft_model_id: str | None = None, adapter_name: str | None = None, *args: Any, **options: Any
    ) -> Any:
        if state_of(self) is None:
            return original(self, peft_model_id, adapter_name, *args, **options)
        config, state = options.pop("peft_config", None), options.pop("adapter_state_dict", None)
        trained = options.pop("is_trainable", False)
        unknown = {name for name, value in options.items() if value not in (None, "auto", False)}
        given = config is not None and state is not None
        if args or unknown or (peft_model_id is None and not given):
            raise TensorParallelError(
                "load_adapter on a sharded model takes a directory or repository (or peft_config and "
                "adapter_state_dict), adapter_name and is_trainable by name; load with other options before sharding."
            )
        where: Any = peft_model_id
        config = PeftConfig.from_pretrained(where) if config is None else config
        config.inference_mode = not trained
        name = adapter_name or "default"
        inject_adapter_in_model(config, self, name)
        self._hf_peft_config_loaded = True
        state = load_peft_weights(where) if state is None else state
        found: Any = set_peft_model_state_dict(self, state, name)
        missing = [key for key in found.missing_keys if f".{name}." in key or key.endswith(f".{name}")]
        if missing or found.unexpected_keys:
            raise TensorParallelError(
                f"the adapter {peft_model_id or name!r} does not fit the model: missing {missing[:3]}, unexpected "
                f"{found.unexpected_keys[:3]}."
            )
        return found

    return load_adapter
