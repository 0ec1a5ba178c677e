"""Supported adapters: a list of tested ones, and an error for any other."""

from __future__ import annotations

import dataclasses

from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from tp_plugin.integrations.features import DORA, EXPERT_ADAPTERS
from tp_plugin.integrations.peft.adapter_method import REPLICATED, Target, method_of_type
from tp_plugin.integrations.peft.methods import METHODS
from tp_plugin.integrations.peft.wrappers import bare_of, copies_of, tuners_of, wrappers_of
from tp_plugin.plans import Plan
from tp_plugin.plans import plan as p

TYPES = (PeftType.LORA, PeftType.IA3, PeftType.PROMPT_TUNING, PeftType.P_TUNING)
COPY_STYLES = (*REPLICATED, p.COLUMN, p.COLUMN_GATHER, p.ROW, p.ROW_SPLIT, p.VOCAB_EMBEDDING, p.VOCAB_HEAD, p.PARTIAL)
"""Styles of modules that ``modules_to_save`` may train a copy of."""


def unsupported_adapter(model: nn.Module) -> str | None:
    """Return an error if adapters in ``model`` cannot be sharded under any plan; None if they can."""
    bare = bare_of(model)
    if bare is None:
        return None
    for name, module in bare.named_modules():
        if isinstance(module, PeftModel | BaseTuner):
            return (
                f"{name or type(model).__name__} is a {type(module).__name__} inside another model, whose adapters "
                "would be missed; give tp_plugin the PeftModel itself, or the model that add_adapter was called on."
            )
    configs = getattr(model, "peft_config", None) or getattr(bare, "peft_config", None)
    for adapter, config in (configs or {}).items():
        if error := unsupported_config(adapter, config):
            return error
    for name, tuner in tuners_of(bare):
        if type(tuner) not in METHODS:
            return (
                f"{name!r} is adapted by a {type(tuner).__module__}.{type(tuner).__name__}, which tensor parallelism "
                f"does not know; {_KNOWN}, or leave the module out of target_modules."
            )
        for adapter, variant in getattr(tuner, "lora_variant", {}).items():  # init_lora_weights sets some variants
            if type(variant) is DoraLinearVariant:
                continue
            return (
                f"{name!r} has the LoRA variant {type(variant).__name__} in adapter {adapter!r}, which tensor "
                "parallelism does not support; train plain LoRA, or use tp_size 1."
            )
    for _, _, name, wrapper in wrappers_of(bare):
        if not isinstance(wrapper, BaseTunerLayer) and type(wrapper) is not ModulesToSaveWrapper:
            return (
                f"{name!r} is in a {type(wrapper).__name__} (trainable_token_indices), which tensor parallelism does "
                "not support; train the full embedding by modules_to_save instead."
            )
    for name, copy in copies_of(bare):
        if any(isinstance(module, BaseTunerLayer) for module in copy.modules()):
            return f"{name!r} is in modules_to_save with adapters inside it; take it out of one of the two."
    return None


_KNOWN = "use LoRA or IA3 on linear layers, embeddings and experts, or prompt tuning"


def unsupported_config(adapter: str, config: PeftConfig) -> str | None:
    """Return an error if ``config`` rules out tensor parallelism; None if it does not."""
    if config.peft_type not in TYPES and method_of_type(config.peft_type) is None:
        return (
            f"adapter {adapter!r} is of PEFT type {getattr(config.peft_type, 'value', config.peft_type)}, which tensor "
            f"parallelism does not support; {_KNOWN}, or use tp_size 1."
        )
    for feature, key in ((DORA, "use_dora"), (EXPERT_ADAPTERS, "target_parameters")):
        if feature.broken and getattr(config, key, None):
            return feature.broken
    variants = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
    for name in variants:
        if getattr(config, name) and name != "use_dora":
            return (
                f"adapter {adapter!r} is a variant of LoRA ({name}), which tensor parallelism does not support; train "
                f"plain LoRA (leave {name} off), or use tp_size 1."
            )
    if getattr(config, "layer_replication", None):
        return (
            f"adapter {adapter!r} repeats layers (layer_replication), which tensor parallelism does not support; "
            "switch it off."
        )
    if getattr(config, "target_modules_to_tie", None):  # PEFT sets it where the embedding is a target
        return (
            f"adapter {adapter!r} ties the LoRA of embedding and head (ensure_weight_tying), which is unsupported; "
            "train the embedding by modules_to_save, which is tied, or switch it off."
        )
    return None


def unsupported_on_plan(bare: nn.Module, plan: Plan) -> str | None:
    """Return an error for an adapter that does not fit the ``plan`` of its module; None if all do."""
    summed = {row for mixture in plan.mixtures if mixture.summed for row in mixture.rows}
    for name, tuner in tuners_of(bare):
        method, target = METHODS[type(tuner)], Target(name, tuner, plan.placements.get(name), name in summed)
        if target.style not in method.styles:
            return (
                f"{type(tuner).__name__} adapters on {name!r} ({target.style}) are not supported under sharding; train "
                "the module itself by modules_to_save, or leave it out of target_modules."
            )
        for adapter in method.parameters(tuner):
            if error := method.unsupported(target, adapter):
                return error
    errors = (_unsupported_copy(name, plan) for name, _ in copies_of(bare))
    return next((error for error in errors if error is not None), None)


def _unsupported_copy(name: str, plan: Plan) -> str | None:
    placement = plan.placements.get(name)
    style = None if placement is None else placement.style
    touched = {
        *(member for region in plan.regions for member in (region.block, *(one.module for one in region.locals))),
        *(mixture.block for mixture in plan.mixtures),
        *(other for other in plan.placements if other != name),
    }
    inside = next((other for other in touched if f"{other}.".startswith(f"{name}.")), None)
    if inside is not None or style not in COPY_STYLES:
        return (
            f"modules_to_save names {name!r}, which is sharded inside; name the linear layers in it one by one, or "
            "train LoRA there."
        )
    return None
