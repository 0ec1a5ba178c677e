"""GGUF files: what training loads instead.

A GGUF file holds quantised blocks in llama.cpp's names and order of heads. transformers turns them into floating-point
weights in memory, in one process; Trainer trains no such model. Converted once, they are an ordinary HF directory, of
which each rank reads its slices.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tp_plugin.errors import TensorParallelError, sentence_of
from tp_plugin.integrations.transformers.export import replace_model
from tp_plugin.weights.staging import Staging


def advice(name: Any, file: Any) -> str:
    """Say how to convert ``file`` of ``name``, a directory or hub id."""
    return f"convert it once: tp-plugin convert-gguf {name!s} {file!s} DIRECTORY, and load the directory"


def convert(name: str, file: str, directory: Path, dtype: torch.dtype) -> list[str]:
    """Write the causal language model in a GGUF file as an HF directory, with its tokenizer.

    Memory holds all weights in ``dtype``. The values are the quantised ones: nothing of what was lost comes back.

    Args:
        name: the directory or hub id that has the file.
        file: its name.
        directory: made if missing; an HF model in it is replaced.
        dtype: of the weights written.

    Returns:
        names of the files written.

    Raises:
        TensorParallelError: transformers cannot read the file, or the disk is full; ``directory`` is unchanged.
    """
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, file)):
        raise TensorParallelError(f"there is no file {file!r} in {name!r}; give the directory, then the file's name.")
    try:
        model = AutoModelForCausalLM.from_pretrained(name, gguf_file=file, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name, gguf_file=file)
    except Exception as failure:
        raise TensorParallelError(f"cannot read {file!r} of {name!r}: {sentence_of(failure)}.") from failure
    _forget_blocks(model)
    try:
        with Staging(directory) as staging:
            model.save_pretrained(staging.path)
            tokenizer.save_pretrained(staging.path)
            weights = {path.name for path in staging.path.glob("model*.safetensors*")}
            return replace_model(staging, weights)
    except OSError as failure:
        raise TensorParallelError(
            f"writing {str(directory)!r} failed: {failure.strerror or failure}; no model there was changed."
        ) from failure


def _forget_blocks(model: Any) -> None:
    """Remove what says that the weights are quantised; they are not any more."""
    vars(model.config).pop("quantization_config", None)
    vars(model).pop("hf_quantizer", None)
    assert all(param.is_floating_point() for param in model.parameters())
