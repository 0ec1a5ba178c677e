"""What a person means by a model: a hub id, a local directory, a model type, or the name of a class."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from tp_plugin.errors import TensorParallelError
from tp_plugin.verify.check import short
from tp_plugin.verify.specimen import architectures, class_for, config_for


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model class and the config to build it with."""

    model_class: type[nn.Module]
    config: Any
    name: str


def subject_of(text: str, *, trust_remote_code: bool = False) -> Subject:
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
        return Subject(named, _default(named), text)
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
        raise TensorParallelError(f"cannot read the config of {text!r}: {short(failure)}") from failure
    if trust_remote_code and (remote := _remote_class(config, text)) is not None:
        return Subject(remote, config, text)
    return _of_config(config, text)


def _of_config(config: Any, name: str) -> Subject:
    model_class = class_for(config)
    return Subject(model_class, config_for(model_class, config), name)


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
