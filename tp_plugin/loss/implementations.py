"""Which implementation of the rows' arithmetic runs where."""

from __future__ import annotations

from typing import Any

import torch

from tp_plugin.errors import TensorParallelError
from tp_plugin.loss.block import TorchBlock

IMPLEMENTATIONS = ("auto", "reference", "chunked", "triton")


def block_for(impl: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The block class of ``impl`` for logits of ``dtype`` on ``device``; None for the reference, which has none.

    Raises:
        TensorParallelError: an unknown name, or one that cannot run here, with the reason.
    """
    if impl not in IMPLEMENTATIONS:
        raise TensorParallelError(f"impl must be one of {IMPLEMENTATIONS}, got {impl!r}.")
    if impl == "reference":
        return None
    if impl == "chunked":
        return TorchBlock
    obstacle = triton_obstacle(device, dtype)
    if obstacle is None:
        from tp_plugin.loss.kernels import TritonBlock

        return TritonBlock
    if impl == "triton":
        raise TensorParallelError(f"impl='triton' cannot run here: {obstacle}; use impl='chunked' or 'auto'.")
    return TorchBlock


def triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run on ``device`` in ``dtype``; None if they can."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its arithmetic is float32, the inputs are {dtype}"
    try:
        from tp_plugin.loss import kernels
    except ImportError as failure:
        return f"the package triton cannot be imported ({failure})"
    if device.type != "cuda" and not kernels.INTERPRETED:
        return f"it needs a CUDA or ROCm device, the inputs are on {device.type} (TRITON_INTERPRET=1 simulates one)"
    return None
