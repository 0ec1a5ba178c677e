"""A model and a tokenizer made on the spot, for runs that start from nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tp_plugin.errors import TensorParallelError

END = "<|end|>"  # the one special token of a built tokenizer: separates documents, ends a generation, pads


def is_missing(path: str, file: str) -> bool:
    """Whether there is no ``file`` in the directory ``path``, or no such directory."""
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
    """Write a causal LM of this config with random weights to ``directory``, as one would find it on the hub.

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
