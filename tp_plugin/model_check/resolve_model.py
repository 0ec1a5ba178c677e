"""Resolve a hub id, directory, model type or class to a model class and a complete config."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from tp_plugin.errors import TensorParallelError, sentence_of

HEADS = {
    "seq2seq LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "masked LM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "causal LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "sequence classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "vision-language": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "speech seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
}
"""Kinds of heads, in order of preference, and the table of transformers that lists their classes."""


@dataclasses.dataclass(frozen=True)
class ResolvedModel:
    """A model class and the config to build it with."""

    model_class: type[nn.Module]
    config: Any
    name: str


def resolve_model(text: str, *, trust_remote_code: bool = False) -> ResolvedModel:
    """Find the model that ``text`` names.

    Args:
        text: ``LlamaConfig``, ``LlamaForCausalLM``, ``llama``, a directory with a ``config.json``, or a hub id; only
            the config is read.
        trust_remote_code: run the modelling code that comes with a checkpoint.

    Raises:
        TensorParallelError: nothing of that name, no network, or no class with a head for it.
    """
    import transformers
    from transformers import AutoConfig

    named = getattr(transformers, text, None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedConfig):
        return _of_config(named(), text)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return ResolvedModel(named, _default(named), text)
    if text in architectures():
        return _of_config(AutoConfig.for_model(text), text)
    if text.isidentifier() and not Path(text).exists():
        near = [name for name in architectures() if name.startswith(text[:4])]
        raise TensorParallelError(
            f"{text!r} is neither a class of transformers, nor a model type with a head, nor a directory; model types "
            f"like it: {', '.join(near[:8]) or 'none'}."
        )
    try:
        config = AutoConfig.from_pretrained(text, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as failure:
        raise TensorParallelError(f"cannot read the config of {text!r}: {sentence_of(failure)}.") from failure
    if trust_remote_code and (remote := _remote_class(config, text)) is not None:
        return ResolvedModel(remote, config, text)
    return _of_config(config, text)


def _of_config(config: Any, name: str) -> ResolvedModel:
    model_class = class_for(config)
    return ResolvedModel(model_class, config_for(model_class, config), name)


def _default(model_class: Any) -> Any:
    if model_class.config_class is None:
        raise TensorParallelError(f"{model_class.__name__} belongs to no config; name a model class with a head.")
    return model_class.config_class()


def _remote_class(config: Any, path: str) -> type[nn.Module] | None:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    given = getattr(config, "auto_map", None) or {}
    for head in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM"):
        if head in given:
            return get_class_from_dynamic_module(given[head], path)
    return None


def architectures() -> dict[str, tuple[str, str]]:
    """Every model type of the installed transformers that has a head of :data:`HEADS` -> (kind, class name)."""
    from transformers.models.auto import modeling_auto

    found: dict[str, tuple[str, str]] = {}
    for kind, table in HEADS.items():
        for model_type, name in getattr(modeling_auto, table).items():
            found.setdefault(model_type, (kind, name if isinstance(name, str) else name[0]))
    return dict(sorted(found.items()))


def class_named(name: str) -> type[nn.Module]:
    """A model class of transformers by its name."""
    import transformers

    return getattr(transformers, name)


def class_for(config: Any) -> type[nn.Module]:
    """The model class for a config: the one its checkpoint names, else the best head of its model type.

    Raises:
        TensorParallelError: transformers has no model with a loss for it.
    """
    import transformers

    for name in config.architectures or ():
        if isinstance(found := getattr(transformers, name, None), type):
            return found
    known = architectures()
    if config.model_type not in known and (registered := _registered_class(config)) is not None:
        return registered
    if config.model_type not in known:
        raise TensorParallelError(
            f"transformers has no language-model or classification head for model type {config.model_type!r}; name the "
            "class in 'architectures' of the config."
        )
    return class_named(known[config.model_type][1])


def _registered_class(config: Any) -> type[nn.Module] | None:
    """Find the class that a user registered for a config, by ``AutoModelForCausalLM.register`` or the like."""
    from transformers.models.auto import modeling_auto

    mappings = (getattr(modeling_auto, table.removesuffix("_NAMES")) for table in HEADS.values())
    return next((mapping[type(config)] for mapping in mappings if type(config) in mapping), None)


def config_for(model_class: type[nn.Module], config: Any) -> Any:
    """``config``, or the part of it that ``model_class`` takes (the text model of a vision-language config)."""
    wanted = getattr(model_class, "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    return next((part for part in configs_in(config) if type(part) is wanted), config)


def configs_in(config: Any) -> Iterator[Any]:
    """Yield ``config`` and every config nested in it."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from configs_in(value)


LEFT_OPEN = {
    "vocab_size": 131, "num_experts_per_tok": 2, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "pad_token_id": 0,
}  # fmt: skip
"""Fields that some classes leave at None although their models need them."""


def complete_config(config: Any) -> None:
    """Fill fields that a class's defaults leave at None although its model needs them; every checkpoint has them."""
    fields = vars(config)
    for name, value in LEFT_OPEN.items():
        if fields.get(name, 0) is None:
            fields[name] = value
    if fields.get("num_key_value_heads", 0) is None and type(fields.get("num_attention_heads")) is int:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if config.model_type == "xmod":
        fields["default_language"] = fields.get("default_language") or fields["languages"][0]
    heads, hidden = fields.get("num_attention_heads"), fields.get("hidden_size")
    if type(heads) is int and type(hidden) is int and 0 < heads <= hidden and fields.get("head_dim", 0) is None:
        fields["head_dim"] = hidden // heads
    elif type(heads) is int and type(hidden) is int and heads > 0 and hidden % heads and "head_dim" not in fields:
        fields["head_dim"] = (hidden // heads + 15) // 16 * 16


def explicit_sections(config: Any) -> None:
    """Add multimodal rotary sections, which Qwen- and GLM-like text models expect."""
    fields = vars(config)
    rope = fields.get("rope_parameters")
    heads, hidden = fields.get("num_attention_heads"), fields.get("hidden_size")
    if not (isinstance(rope, dict) and "rope_theta" in rope and heads and hidden and "vocab_size" in fields):
        return
    share = rope.get("partial_rotary_factor") or fields.get("partial_rotary_factor") or 1.0
    rotary = int((fields.get("head_dim") or hidden // heads) * share)
    if rotary in (64, 128):
        rope.setdefault("mrope_section", [rotary // 8, rotary * 3 // 16, rotary * 3 // 16])


def match_widths(vision: Any, text: Any) -> None:
    """Give a vision tower the output width of its text model; the defaults of some classes do not match."""
    fields, hidden = vars(vision), getattr(text, "hidden_size", None)
    if type(hidden) is int and type(fields.get("out_hidden_size")) is int:
        fields["out_hidden_size"] = hidden
    elif type(hidden) is int and type(fields.get("embed_dim")) is int and "mlp_ratio" in fields:  # Qwen2-VL's
        fields["hidden_size"] = hidden
