"""The model a recipe names, complete or not at all."""

from __future__ import annotations

from typing import Any

import tp_plugin
from tp_plugin.config import TensorParallelConfig
from tp_plugin.errors import TensorParallelError
from tp_plugin.launch.recipe import ModelRecipe


def load_model(recipe: ModelRecipe, config: TensorParallelConfig | None = None) -> Any:
    """A causal LM in CPU memory, as ``from_pretrained`` loads it.

    With a ``config`` of tp_size above 1 each rank reads its slices of a text model; a model that is part of a larger
    checkpoint comes whole, to be sharded by the engine.

    Of a checkpoint that also sees or hears, ``recipe.text_only`` takes the language model: its modules, under the class
    and the parameter names that transformers gives the text model alone.

    Raises:
        TensorParallelError: the checkpoint lacks weights of the model. transformers would leave them random, with a
            warning.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source: dict[str, Any] = {"revision": recipe.revision, "trust_remote_code": recipe.trust_remote_code}
    options: dict[str, Any] = {
        "dtype": recipe.dtype,
        "attn_implementation": recipe.attn_implementation,
        "output_loading_info": True,
    }
    known = AutoConfig.from_pretrained(recipe.path, **source)
    loaded: Any
    if config is not None and config.tp_size > 1 and known.get_text_config() is known:
        loaded = tp_plugin.from_pretrained(
            recipe.path, model_class=AutoModelForCausalLM, config=config, **source, **options
        )
    else:
        loaded = AutoModelForCausalLM.from_pretrained(recipe.path, **source, **options)
    model, info = loaded
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise TensorParallelError(
            f"the checkpoint {recipe.path!r} lacks {len(names)} weights of {type(model).__name__}, {names[0]!r} among "
            "them; name the checkpoint this model was saved to."
        )
    text_config = model.config.get_text_config()
    if text_config is model.config:
        return model
    if not recipe.text_only:
        raise TensorParallelError(
            f"{recipe.path!r} is a {type(model).__name__}, which takes more than text; set model.text_only: true to "
            "train its language model alone."
        )
    return _text_model(model, text_config)


def _text_model(model: Any, text_config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        text = AutoModelForCausalLM.from_config(text_config)
    setattr(text, text.base_model_prefix, model.get_decoder())
    text.set_output_embeddings(model.get_output_embeddings())
    text.config.dtype = model.dtype
    text.generation_config = model.generation_config
    left = [name for name, tensor in text.state_dict().items() if tensor.is_meta]
    if left:
        raise TensorParallelError(f"model.text_only finds no {left[0]!r} in {type(model).__name__}.")
    return text
