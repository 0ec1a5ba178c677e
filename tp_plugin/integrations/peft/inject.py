"""Adapters put into a model that is sharded already: made at full size, then sharded at once.

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
from tp_plugin.integrations import zero3
from tp_plugin.integrations.features import ADAPTERS
from tp_plugin.integrations.peft import support_matrix
from tp_plugin.integrations.peft.adapter_method import method_of_type
from tp_plugin.integrations.peft.methods import shard_adapters
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.integrations.versions import is_before, named
from tp_plugin.layers import Boundary, VocabParallelHead, sum_partial_gradient
from tp_plugin.layout import ShardLayout
from tp_plugin.loss import VocabShard
from tp_plugin.mesh import ParallelMesh
from tp_plugin.param_info import copy_info, full_shape, info_of, layout_of, update_info
from tp_plugin.partitioned import has_partitioned
from tp_plugin.sharding import root_of, state_of
from tp_plugin.sharding.adapters import attach_layout
from tp_plugin.sharding.full_tensors import NO_ASSIGN, take_full_tensors
from tp_plugin.sharding.inputs import bring_in_step
from tp_plugin.sharding.pre_shard_state import remembering
from tp_plugin.sharding.shard import layouts_of
from tp_plugin.sharding.state import Part, mark_parts
from tp_plugin.sharding.sync_params import equalise

PLAIN_INITS = (True, False, "gaussian")
"""Initialisations of LoRA that do not read the base's weights."""
BY_SHARDS = ("linear", "cat")
"""Combinations of LoRAs that are right on shards."""


upstream = Upstream(ADAPTERS)
_SHARDED = "adapters that are put into a sharded model are sharded there"


@upstream.patch(BaseTuner, "inject_adapter", ["model", "adapter_name"], _SHARDED)
def _inject_adapter(
    original: Callable[..., Any], self: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    record = state_of(model)
    if record is None:
        return original(self, model, adapter_name, *args, **kwargs)
    config, root = self.peft_config[adapter_name], root_of(model)
    agree(_partial(model, root) or _obstacle(model, adapter_name, config))
    assert root is not None
    before = {id(param) for param in model.parameters()}
    with _of_full_size(model):
        found = original(self, model, adapter_name, *args, **kwargs)
    made = {name: param for name, param in model.named_parameters() if id(param) not in before}
    fresh = {name: param for name, param in made.items() if layout_of(param) is None}  # no copies of shards
    settled = support_matrix.unsupported_config(adapter_name, config)  # PEFT has filled in what it ties
    agree(
        settled
        or support_matrix.unsupported_adapter(model)
        or support_matrix.unsupported_on_plan(model, record.plan)
        or _empty(fresh)
    )
    equalise(fresh, record.mesh)
    with remembering(model):
        shard_adapters(model, record.mesh)
        mark_parts(root, record)
        take_full_tensors(root, record.mesh)
    shapes = {name: full_shape(p) for name, p in model.named_parameters()}
    record.update(layouts_of(model), shapes)
    return found


def _partial(model: nn.Module, root: nn.Module | None) -> str | None:
    if root is not None and any(module is root for module in model.modules()):
        return None
    return (
        f"an adapter cannot be put into a {type(model).__name__} inside a sharded model; give PEFT the full model and "
        "name the part in target_modules."
    )


def _empty(fresh: Mapping[str, nn.Parameter]) -> str | None:
    if any(param.is_meta for param in fresh.values()):
        return NO_ASSIGN
    return None


def _obstacle(model: nn.Module, adapter: str, config: Any) -> str | None:
    if error := ADAPTERS.broken or support_matrix.unsupported_config(adapter, config):
        return error
    if has_partitioned(model):
        return "this model's parameters are partitioned by ZeRO-3 already; add adapters before deepspeed.initialize."
    if (method := method_of_type(config.peft_type)) is not None and not method.after_sharding:
        return (
            f"adapter {adapter!r} is of PEFT type {config.peft_type.value}, whose layers PEFT makes as small as the "
            "shards of this model; put the adapter in before sharding."
        )
    if getattr(config, "use_dora", False):
        return "DoRA starts from the norms of full weights, and this model is sharded; put it in before sharding."
    if getattr(config, "target_parameters", None) and is_before("peft", "0.21"):
        return (
            f"LoRA on experts of {named('peft')} is made as small as the shards of this model; put it in before "
            "sharding, or install peft 0.21."
        )
    if getattr(config, "init_lora_weights", True) not in PLAIN_INITS:
        return (
            f"init_lora_weights={config.init_lora_weights!r} reads full weights, and this model is sharded; put the "
            "adapter in before sharding."
        )
    return None


@contextlib.contextmanager
def _of_full_size(model: nn.Module) -> Iterator[None]:
    """While open, sharded modules show their full sizes, which PEFT reads to make adapters for them."""
    sizes: list[tuple[Any, str, int]] = []
    for module in model.modules():
        layout = getattr(module, "tp_layout", None)
        if isinstance(layout, ShardLayout) and isinstance(module, nn.Linear | nn.Embedding):
            names = ("out_features", "in_features") if isinstance(module, nn.Linear) else ("num_embeddings",)
            for name, size in zip(names, layout.shape, strict=False):
                sizes.append((module, name, getattr(module, name)))
                setattr(module, name, size)
    layouts = {param: layout_of(param) for param in model.parameters()}
    shapes = {param: layout.shape for param, layout in layouts.items() if layout is not None}
    try:
        with zero3.shapes_shown(shapes):
            yield
    finally:
        for module, name, size in sizes:
            setattr(module, name, size)


@upstream.patch(PeftModel, "_setup_prompt_encoder", ["adapter_name"], _SHARDED)
def _setup_prompt_encoder(original: Callable[..., Any], self: PeftModel, adapter_name: str) -> Any:
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


@upstream.patch(ModulesToSaveWrapper, "update", ["adapter_name"], _SHARDED)
def _update(
    original: Callable[..., Any], self: ModulesToSaveWrapper, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    first = self.original_module
    mesh = _mesh_of(first)
    if mesh is None or adapter_name in self.modules_to_save:
        return original(self, adapter_name, *args, **kwargs)
    first.__deepcopy__ = functools.partial(_copy, first, mesh)
    try:
        found = original(self, adapter_name, *args, **kwargs)
        if (source := _tied_to(args, kwargs)) is not None:
            self.modules_to_save[adapter_name] = _tied_copy(first, source)
        return found
    finally:
        first.__dict__.pop("__deepcopy__", None)


def _tied_to(args: tuple, kwargs: Mapping[str, Any]) -> nn.Module | None:
    """Return the embedding's copy that PEFT ties this one to (``ensure_weight_tying``); None for one of its own."""
    return args[0] if args else kwargs.get("tied_module")


def _tied_copy(module: nn.Module, source: Any) -> nn.Module:
    """Copy a sharded head onto the shard of ``source``; PEFT would make a plain linear layer of it."""
    copied: Any = copy.deepcopy(module)
    copied.weight = source.weight
    if isinstance(copied, VocabParallelHead):
        update_info(source.weight, vocab=copied.tp_vocab)
    return copied


def _mesh_of(module: nn.Module) -> ParallelMesh | None:
    of_layers = (getattr(part, "tp_mesh", None) for part in module.modules())
    of_gradients = (info_of(param).partial_over for param in module.parameters())
    return next((mesh for mesh in (*of_layers, *of_gradients) if isinstance(mesh, ParallelMesh)), None)


def _copy(module: nn.Module, mesh: ParallelMesh, _memo: dict) -> nn.Module:
    """Copy a sharded module, with the same groups and the same region entry or exit."""
    del module.__deepcopy__
    if list(module.children()):
        raise TensorParallelError(
            f"modules_to_save names a {type(module).__name__} that is sharded inside; name the linear layers in it one "
            "by one."
        )
    shared = [
        value for value in vars(module).values() if isinstance(value, Boundary | ParallelMesh | VocabShard | Part)
    ]
    copied = copy.deepcopy(module, {id(value): value for value in shared})
    for (_, old), (_, new) in zip(module.named_parameters(), copied.named_parameters(), strict=True):
        # copying drops a parameter's attributes and hooks
        vars(new).update({name: value for name, value in vars(old).items() if name != zero3.SHAPE})
        copy_info(old, new)
        if (layout := layout_of(old)) is not None:
            attach_layout(new, layout, mesh)
        elif info_of(old).partial_over is not None:
            sum_partial_gradient(new, mesh)
    if isinstance(copied, nn.Linear):  # these, and the shape above, may be the full ones that PEFT is told just now
        copied.out_features, copied.in_features = copied.weight.shape
    layout = getattr(copied, "tp_layout", None)
    if isinstance(copied, VocabParallelHead) and layout is not None:
        copied.out_features = layout.shape[0]
    elif isinstance(copied, nn.Embedding):
        copied.num_embeddings = copied.weight.shape[0] if layout is None else layout.shape[0]
    return copied


@upstream.patch(
    LoraModel,
    "add_weighted_adapter",
    ["adapters", "weights", "adapter_name", "combination_type"],
    "it would combine shards",
)
def _add_weighted_adapter(original: Callable[..., Any], self: LoraModel, *args: Any, **kwargs: Any) -> Any:
    """Allow sums and concatenations, which act on shards; refuse singular values, thresholds and random masks."""
    options = inspect.signature(original).bind(self, *args, **kwargs)
    options.apply_defaults()
    kind = options.arguments["combination_type"]
    if state_of(self.model) is not None and kind not in BY_SHARDS:
        raise TensorParallelError(
            f"add_weighted_adapter with combination_type={kind!r} reads full matrices and this model is sharded; use "
            "'linear' or 'cat', or combine the saved adapters in one process."
        )
    return original(self, *args, **kwargs)
