"""Export to an ordinary HF directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from tp_plugin.errors import TensorParallelError, agree
from tp_plugin.weights.gather import full_state_dict, unwrapped


def save_pretrained(model_or_engine: nn.Module | Any, directory: str | Path, **options: Any) -> None:
    """Write safetensors and config that plain ``from_pretrained`` loads in one process. A collective call.

    Global rank 0 gathers the full model in its CPU memory and writes; the call returns on every rank when the
    directory is complete. Training may go on afterwards.

    Args:
        model_or_engine: a sharded transformers model, or the DeepSpeed engine around it.
        directory: created if missing.
        options: handed to transformers' ``save_pretrained`` (``max_shard_size``, ``push_to_hub``, ...).

    Raises:
        TensorParallelError: on every rank, when the model has no ``save_pretrained`` or writing failed.
    """
    model: Any = unwrapped(model_or_engine)
    if not hasattr(model, "save_pretrained"):
        raise TensorParallelError(
            f"{type(model).__name__} is not a transformers model; write tp_plugin.full_state_dict(model) yourself."
        )
    state = full_state_dict(model_or_engine)
    error = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            model.save_pretrained(directory, state_dict=state, is_main_process=True, **options)
        except Exception as failure:  # whatever it was, every rank must learn of it
            error = f"writing {str(directory)!r} failed: {type(failure).__name__}: {failure}"
    agree(error)
