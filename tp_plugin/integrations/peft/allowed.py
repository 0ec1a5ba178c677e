"""Which adapters are sharded: a list of what is right, and a sentence for everything else."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft import PeftConfig, PeftModel, PeftType
from peft.tuners import ia3, lora
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from tp_plugin.integrations.peft.lay import VocabParallelLoraEmbedding, adapters_in
from tp_plugin.integrations.peft.wrappers import bare_of, tuners_of, twins_of, wrappers_of
from tp_plugin.plans import Placement, Plan
from tp_plugin.plans import plan as p

TYPES = (PeftType.LORA, PeftType.IA3, PeftType.PROMPT_TUNING, PeftType.P_TUNING)
REPLICATED = (None, p.REPLICATED)
STYLES: dict[type, tuple[str | None, ...]] = {
    lora.Linear: (*REPLICATED, p.COLUMN, p.COLUMN_GATHER, p.ROW, p.ROW_SPLIT, p.VOCAB_HEAD, p.ENTER, p.LATENT),
    lora.Embedding: (*REPLICATED, p.VOCAB_EMBEDDING),
    VocabParallelLoraEmbedding: (*REPLICATED, p.VOCAB_EMBEDDING),
    ParamWrapper: (*REPLICATED, p.EXPERTS),
    ia3.Linear: (*REPLICATED, p.COLUMN, p.COLUMN_GATHER, p.ROW, p.ROW_SPLIT),
}
"""Layers with adapters, by class, and the styles of the modules that they may adapt."""
TWIN_STYLES = (*REPLICATED, p.COLUMN, p.COLUMN_GATHER, p.ROW, p.ROW_SPLIT, p.VOCAB_EMBEDDING, p.VOCAB_HEAD, p.PARTIAL)
"""Styles of modules that ``modules_to_save`` may train a copy of."""


def obstacle(model: nn.Module) -> str | None:
    """Why adapters in ``model`` cannot be sharded whatever the plan; None if they can."""
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
        if error := config_obstacle(adapter, config):
            return error
    for name, tuner in tuners_of(bare):
        if type(tuner) not in STYLES:
            return (
                f"{name!r} is adapted by a {type(tuner).__module__}.{type(tuner).__name__}, which tensor parallelism "
                f"does not know; {_KNOWN}, or leave the module out of target_modules."
            )
        for adapter, variant in getattr(tuner, "lora_variant", {}).items():  # some come with init_lora_weights
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
                "not support; train the whole embedding by modules_to_save instead."
            )
    for name, twin in twins_of(bare):
        if any(isinstance(module, BaseTunerLayer) for module in twin.modules()):
            return f"{name!r} is in modules_to_save with adapters inside it; take it out of one of the two."
    return None


_KNOWN = "use LoRA or IA3 on linear layers, embeddings and experts, or prompt tuning"


def config_obstacle(adapter: str, config: PeftConfig) -> str | None:
    """What of ``config`` rules out tensor parallelism; None if nothing."""
    if config.peft_type not in TYPES:
        return (
            f"adapter {adapter!r} is of PEFT type {getattr(config.peft_type, 'value', config.peft_type)}, which tensor "
            f"parallelism does not support; {_KNOWN}, or use tp_size 1."
        )
    variants = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
    for name in variants:
        if getattr(config, name) and name != "use_dora":
            return (
                f"adapter {adapter!r} is a variant of LoRA ({name}), which tensor parallelism does not support; train "
                f"plain LoRA (leave {name} off), or use tp_size 1."
            )
    for name, what in (("layer_replication", "repeats layers"), ("ensure_weight_tying", "ties adapters")):
        if getattr(config, name, None):
            return f"adapter {adapter!r} {what} ({name}), which tensor parallelism does not support; switch it off."
    return None


def objection(bare: nn.Module, plan: Plan) -> str | None:
    """Which adapter does not go with what ``plan`` makes of its module; None if all do."""
    summed = {row for mixture in plan.mixtures if mixture.summed for row in mixture.rows}
    for name, tuner in tuners_of(bare):
        placement = plan.placements.get(name)
        style = None if placement is None else placement.style
        if style not in STYLES[type(tuner)]:
            hint = "train it whole by modules_to_save, or leave it out of target_modules"
            return f"{type(tuner).__name__} adapters on {name!r} ({style}) are not supported under sharding; {hint}."
        repeats = placement is not None and placement.style == p.COLUMN and placement.outputs is not None
        if isinstance(tuner, ia3.IA3Layer) and repeats and not tuner.is_feedforward:
            return f"IA3 on {name!r} scales key/value heads that ranks share; choose an autotp_size that divides them."
        for adapter in adapters_in(tuner):
            if error := _particulars(name, tuner, adapter, placement, name in summed):
                return error
    for name, _ in twins_of(bare):
        if error := _twin_objection(name, plan):
            return error
    return None


def _particulars(name: str, tuner: Any, adapter: str, placement: Placement | None, summed: bool) -> str | None:
    style = None if placement is None else placement.style
    if adapter in getattr(tuner, "lora_magnitude_vector", {}):
        repeats = placement is not None and placement.outputs is not None
        if summed or repeats or style in (p.COLUMN_GATHER, p.VOCAB_HEAD, p.ENTER, p.LATENT):
            what = "key/value heads that a rank uses more than once" if repeats else f"style {style}"
            return f"DoRA on {name!r} ({what}) is not supported; train LoRA there, or leave it out of target_modules."
    cut = {} if placement is None else placement.layouts
    if isinstance(tuner, ParamWrapper) and style == p.EXPERTS and tuner.parameter_name not in cut:
        return (
            f"target_parameters names {tuner.parameter_name!r} of {name!r}, which every rank holds whole and would add "
            "to a partial result; leave it out of target_parameters."
        )
    if isinstance(tuner, lora.Linear) and tuner.lora_bias[adapter]:
        if summed:
            return f"lora_bias on {name!r} would be added to a result that is partial still; set lora_bias=False."
        if style == p.VOCAB_HEAD:
            return f"lora_bias on the head {name!r} is not supported; set lora_bias=False."
    return None


def _twin_objection(name: str, plan: Plan) -> str | None:
    placement = plan.placements.get(name)
    style = None if placement is None else placement.style
    touched = {
        *(member for region in plan.regions for member in (region.block, *(one.module for one in region.locals))),
        *(mixture.block for mixture in plan.mixtures),
        *(other for other in plan.placements if other != name),
    }
    inside = next((other for other in touched if f"{other}.".startswith(f"{name}.")), None)
    if inside is not None or style not in TWIN_STYLES:
        return (
            f"modules_to_save names {name!r}, which is sharded inside; name the linear layers in it one by one, or "
            "train LoRA there."
        )
    return None
