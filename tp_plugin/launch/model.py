"""The model and the tokenizer of a recipe: loaded, or built with random weights for runs that start from nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import tp_plugin
from tp_plugin.config import TensorParallelConfig
from tp_plugin.errors import TensorParallelError
from tp_plugin.launch.recipe import ModelRecipe

END = "<|end|>"  # the one special token of a built tokenizer: separates documents, ends a generation, pads


def load_model(recipe: ModelRecipe, config: TensorParallelConfig | None = None) -> Any:
    """A causal LM in CPU memory, as ``from_pretrained`` loads it.

    With a ``config`` of tp_size above 1 each rank reads its slices of a text model. A model that is part of a larger
    checkpoint is loaded in full, and the engine shards it.

    Of a multimodal checkpoint ``recipe.text_only`` takes the language model: its modules, with the class and the
    parameter names of transformers' text model.

    Raises:
        TensorParallelError: the checkpoint lacks weights of the model, which transformers would leave random.
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


def is_missing(path: str, file: str) -> bool:
    """Return True if the directory ``path`` has no ``file``, or does not exist."""
    return not (Path(path) / file).exists()


def build_tokenizer(directory: str, vocab_size: int, texts: Iterable[str]) -> None:
    """Train a byte-level BPE on ``texts`` and write it to ``directory`` in HF format. Deterministic.

    Raises:
        TensorParallelError: ``vocab_size`` is too small for the bytes alone, or the texts yield fewer tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet) + 1:
        raise TensorParallelError(
            f"tokenizer.build_vocab_size must be more than {len(alphabet) + 1}, got {vocab_size}."
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise TensorParallelError(
            f"the text yields only {tokenizer.get_vocab_size()} of tokenizer.build_vocab_size {vocab_size} tokens; "
            "lower it or give more text."
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    ).save_pretrained(directory)


def build_model(directory: str, config: dict[str, Any], tokenizer: Any, *, seed: int) -> None:
    """Write a causal LM of this config with random weights to ``directory``, in HF format.

    Args:
        config: ``model_type`` and the options of its config class; vocabulary size and special tokens are filled in
            from ``tokenizer`` unless given.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    options = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    } | config
    set_seed(seed)
    try:
        model_config = AutoConfig.for_model(options.pop("model_type"), **options)
    except (TypeError, ValueError) as failure:
        raise TensorParallelError(f"'model.build' describes no model: {failure}") from failure
    os.makedirs(directory, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(model_config).save_pretrained(directory)
