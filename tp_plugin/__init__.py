"""tp-plugin: tensor parallelism x ZeRO for HuggingFace models, in DeepSpeed's AutoTP slot.

    import tp_plugin
    tp_plugin.register()        # then deepspeed.initialize, accelerate launch, Trainer: all as before

with ``"tensor_parallel": {"autotp_size": N}`` in the DeepSpeed config. A name is imported when it is first used.
"""

import importlib as _importlib
import importlib.metadata as _metadata
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from tp_plugin.api import check_next_step, from_pretrained, register, save_pretrained, shard_model, unregister
    from tp_plugin.config import TensorParallelConfig
    from tp_plugin.errors import TensorParallelError
    from tp_plugin.integrations.peft.adapter_method import AdapterMethod, register_adapter
    from tp_plugin.integrations.versions import moved_name
    from tp_plugin.layers.local_arguments import Heads, attention_heads
    from tp_plugin.layout import ShardLayout
    from tp_plugin.mesh import ParallelMesh
    from tp_plugin.plans import Packing, Plan, Rule, register_family, register_packing
    from tp_plugin.weights import full_state_dict

_HOMES = {
    "api": ("check_next_step", "from_pretrained", "register", "save_pretrained", "shard_model", "unregister"),
    "config": ("TensorParallelConfig",),
    "errors": ("TensorParallelError",),
    "integrations.peft.adapter_method": ("AdapterMethod", "register_adapter"),
    "integrations.versions": ("moved_name",),
    "layers.local_arguments": ("Heads", "attention_heads"),
    "layout": ("ShardLayout",),
    "mesh": ("ParallelMesh",),
    "plans": ("Packing", "Plan", "Rule", "register_family", "register_packing"),
    "weights": ("full_state_dict",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

try:
    __version__ = _metadata.version("tp-plugin")
except _metadata.PackageNotFoundError:  # a source tree that was never installed
    __version__ = "unknown"


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(_importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "AdapterMethod",
    "Heads",
    "Packing",
    "ParallelMesh",
    "Plan",
    "Rule",
    "ShardLayout",
    "TensorParallelConfig",
    "TensorParallelError",
    "__version__",
    "attention_heads",
    "check_next_step",
    "from_pretrained",
    "full_state_dict",
    "moved_name",
    "register",
    "register_adapter",
    "register_family",
    "register_packing",
    "save_pretrained",
    "shard_model",
    "unregister",
]
