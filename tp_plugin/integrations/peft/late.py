"""Models that are adapted after they were sharded: adapters are made as for the whole model, then laid at once.

So a rank draws the same random numbers as one process would, and the ranks of a TP group start with one adapter.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from tp_plugin.errors import TensorParallelError, agree
from tp_plugin.integrations.contract import Patches, contract, out_of_range
from tp_plugin.integrations.peft import allowed
from tp_plugin.integrations.peft.lay import EMPTY, lay
from tp_plugin.layers import sum_partial_gradient
from tp_plugin.layout import ShardLayout
from tp_plugin.loss import VocabShard
from tp_plugin.mesh import ParallelMesh
from tp_plugin.sharding import state_of
from tp_plugin.sharding.adapters import note
from tp_plugin.sharding.equal import equalise
from tp_plugin.sharding.inputs import bring_in_step
from tp_plugin.sharding.original import remembering
from tp_plugin.sharding.shard import layouts_of

PLAIN_INITS = (True, False, "gaussian")
"""Ways to begin a LoRA that do not look at the base's weights."""
BY_SHARDS = ("linear", "cat")
"""Ways to combine LoRAs that give shards of the combination when they are done on shards."""


def check_contracts() -> None:
    """See :func:`tp_plugin.integrations.peft.check_contracts`."""
    why = "adapters that are put into a sharded model are sharded there"
    contract(BaseTuner, "inject_adapter", ["model", "adapter_name"], why)
    contract(PeftModel, "_setup_prompt_encoder", ["adapter_name"], why)
    contract(ModulesToSaveWrapper, "update", ["adapter_name"], why)
    combined = ["adapters", "weights", "adapter_name", "combination_type"]
    contract(LoraModel, "add_weighted_adapter", combined, "it would combine shards")


def install(patches: Patches) -> None:
    """Lay the patches; models that are not sharded are adapted as ever."""
    patches.replace(BaseTuner, "inject_adapter", _inject_method)
    patches.replace(PeftModel, "_setup_prompt_encoder", _prompt_method)
    patches.replace(ModulesToSaveWrapper, "update", _update_method)
    patches.replace(LoraModel, "add_weighted_adapter", _add_weighted_method)


def _inject_method(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def inject_adapter(self: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        record = state_of(model)
        if record is None:
            return original(self, model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        agree(_obstacle(model, adapter_name, config))
        before = {id(param) for param in model.parameters()}
        with _of_full_size(model):
            found = original(self, model, adapter_name, *args, **kwargs)
        made = {name: param for name, param in model.named_parameters() if id(param) not in before}
        fresh = {name: param for name, param in made.items() if not hasattr(param, "tp_layout")}  # no twins of shards
        agree(allowed.obstacle(model) or allowed.objection(model, record.plan) or _empty(fresh))
        equalise(fresh, record.mesh)
        with remembering(model):
            lay(model, record.mesh)
        shapes = {name: tuple(getattr(p, "tp_layout", p).shape) for name, p in model.named_parameters()}
        record.update(layouts_of(model), shapes)
        return found

    return inject_adapter


def _empty(fresh: Mapping[str, nn.Parameter]) -> str | None:
    if any(param.is_meta for param in fresh.values()):
        return EMPTY
    return None


def _obstacle(model: nn.Module, adapter: str, config: Any) -> str | None:
    if error := out_of_range("peft", extra="peft") or allowed.config_obstacle(adapter, config):
        return error
    if any(hasattr(param, "ds_id") for param in model.parameters()):
        return "this model's parameters are partitioned by ZeRO-3 already; add adapters before deepspeed.initialize."
    if getattr(config, "use_dora", False):
        return "DoRA begins with the norms of whole weights, and this model is sharded; put it in before sharding."
    if getattr(config, "init_lora_weights", True) not in PLAIN_INITS:
        return (
            f"init_lora_weights={config.init_lora_weights!r} reads whole weights, and this model is sharded; put the "
            "adapter in before sharding."
        )
    return None


@contextlib.contextmanager
def _of_full_size(model: nn.Module) -> Iterator[None]:
    """While open, sharded modules give their full sizes, which PEFT reads where it makes adapters for them."""
    sizes: list[tuple[Any, str, int]] = []
    told: list[Any] = []
    for module in model.modules():
        layout = getattr(module, "tp_layout", None)
        if isinstance(layout, ShardLayout) and isinstance(module, nn.Linear | nn.Embedding):
            names = ("out_features", "in_features") if isinstance(module, nn.Linear) else ("num_embeddings",)
            for name, size in zip(names, layout.shape, strict=False):
                sizes.append((module, name, getattr(module, name)))
                setattr(module, name, size)
    for param in model.parameters():
        if hasattr(param, "tp_layout"):
            told.append(param)
            param.ds_shape = param.tp_layout.shape  # type: ignore[attr-defined]  # DeepSpeed's name for the shape of what is partitioned
    try:
        yield
    finally:
        for module, name, size in sizes:
            setattr(module, name, size)
        for param in told:
            del param.ds_shape


def _prompt_method(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _setup_prompt_encoder(self: PeftModel, adapter_name: str) -> Any:
        record = state_of(self)
        if record is None:
            return original(self, adapter_name)
        agree(_obstacle(self, adapter_name, self.peft_config[adapter_name]))
        if record.mesh.tp_group is not None:
            bring_in_step(self, record.mesh)  # it may draw words and look them up in a sharded embedding
        with _of_full_size(self):
            found = original(self, adapter_name)
        equalise(dict(self.prompt_encoder[adapter_name].named_parameters()), record.mesh)
        return found

    return _setup_prompt_encoder


def _update_method(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def update(self: ModulesToSaveWrapper, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        first = self.original_module
        mesh = _mesh_of(first)
        if mesh is None or adapter_name in self.modules_to_save:
            return original(self, adapter_name, *args, **kwargs)
        first.__deepcopy__ = functools.partial(_twin, first, mesh)
        try:
            return original(self, adapter_name, *args, **kwargs)
        finally:
            first.__dict__.pop("__deepcopy__", None)

    return update


def _mesh_of(module: nn.Module) -> ParallelMesh | None:
    of_layers = (getattr(part, "tp_mesh", None) for part in module.modules())
    of_gradients = (getattr(param, "tp_partial_over", None) for param in module.parameters())
    return next((mesh for mesh in (*of_layers, *of_gradients) if isinstance(mesh, ParallelMesh)), None)


def _twin(module: nn.Module, mesh: ParallelMesh, _memo: dict) -> nn.Module:
    """A copy of a sharded module in the same groups, behind the same door."""
    del module.__deepcopy__
    if list(module.children()):
        raise TensorParallelError(
            f"modules_to_save names a {type(module).__name__} that is sharded inside; name the linear layers in it one "
            "by one."
        )
    shared = [value for value in vars(module).values() if isinstance(value, ParallelMesh | VocabShard)]
    twin = copy.deepcopy(module, {id(value): value for value in shared})
    for (_, old), (_, new) in zip(module.named_parameters(), twin.named_parameters(), strict=True):
        # what is known of a parameter, which copying drops, and so it does its hooks
        vars(new).update({name: value for name, value in vars(old).items() if name not in ("tp_summed", "ds_shape")})
        if hasattr(old, "tp_layout"):
            note(new, old.tp_layout, mesh)
        elif hasattr(old, "tp_partial_over"):
            sum_partial_gradient(new, mesh)
    if isinstance(twin, nn.Linear):  # these, and ds_shape above, may be the full ones that PEFT is told just now
        twin.out_features, twin.in_features = twin.weight.shape
    elif isinstance(twin, nn.Embedding):
        twin.num_embeddings = twin.weight.shape[0]
    return twin


def _add_weighted_method(original: Callable[..., Any]) -> Callable[..., Any]:
    """Sums and concatenations of shards are shards; singular values, thresholds and random masks are not."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def add_weighted_adapter(self: LoraModel, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        kind = given.arguments["combination_type"]
        if state_of(self.model) is not None and kind not in BY_SHARDS:
            raise TensorParallelError(
                f"add_weighted_adapter with combination_type={kind!r} looks at whole matrices and this model is "
                "sharded; use 'linear' or 'cat', or combine the saved adapters in one process."
            )
        return original(self, *args, **kwargs)

    return add_weighted_adapter
