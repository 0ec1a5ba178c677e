"""The choice of an implementation of the rows' arithmetic, the same on all ranks of a group."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from tp_plugin import log
from tp_plugin.errors import TensorParallelError, reason_of, together
from tp_plugin.loss.block import Asked, Coefficients, Targets, TorchBlock
from tp_plugin.loss.parts import Transform

IMPLEMENTATIONS = ("auto", "reference", "chunked", "triton")
_OBSTACLES: dict[tuple[dist.ProcessGroup | None, str, torch.dtype], str] = {}
"""Results of the trial of the kernels, by group, device type and dtype; equal on all ranks of a group."""


def block_for(
    impl: str, device: torch.device, dtype: torch.dtype, group: dist.ProcessGroup | None = None
) -> type[TorchBlock] | Any:
    """The block class of ``impl`` for logits of ``dtype`` on ``device``; None for the reference, which has none.

    The first time that kernels could run on a device, each rank of ``group`` tries them. All use them or none does,
    since a rank with chunks of another size would wait forever. That first time is a collective call.

    Raises:
        TensorParallelError: an unknown name, or one that cannot run here, with the reason.
    """
    if impl not in IMPLEMENTATIONS:
        raise TensorParallelError(f"impl must be one of {IMPLEMENTATIONS}, got {impl!r}.")
    if impl == "reference":
        return None
    if impl == "chunked":
        return TorchBlock
    obstacle = _obstacle_of(group, device, dtype)
    if not obstacle:
        from tp_plugin.loss.kernels import TritonBlock

        return TritonBlock
    if impl == "triton":
        raise TensorParallelError(f"impl='triton' cannot run here: {obstacle}; use impl='chunked' or 'auto'.")
    return TorchBlock


def triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the Triton kernels cannot run on ``device`` in ``dtype``; None without one before a trial."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its arithmetic is float32, the inputs are {dtype}"
    try:
        from tp_plugin.loss import kernels
    except ImportError as failure:
        return f"the package triton cannot be imported ({failure})"
    if device.type != "cuda" and not kernels.INTERPRETED:
        return f"it needs a CUDA or ROCm device, the inputs are on {device.type} (TRITON_INTERPRET=1 simulates one)"
    return None


def _obstacle_of(group: dist.ProcessGroup | None, device: torch.device, dtype: torch.dtype) -> str:
    """The reasons why ranks of ``group`` cannot run the kernels, "" if all can; found once."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return triton_obstacle(device, dtype) or ""  # the same on all ranks
    key = group, device.type, dtype
    if key not in _OBSTACLES:
        here = triton_obstacle(device, dtype) or _tried(device, dtype)
        _OBSTACLES[key] = here if group is None else together(here, group)
        if here and device.type == "cuda" and dtype != torch.float64:
            log.warning(f"the loss goes without its Triton kernels: {here}.", rank0_only=False)
    return _OBSTACLES[key]


@torch.no_grad()
def _tried(device: torch.device, dtype: torch.dtype) -> str:
    """Run both kernels on this rank, and return the reason why they fail, or "".

    The first run compiles them, with a C compiler and a writable cache that a host may lack.
    """
    from tp_plugin.loss.kernels import TritonBlock

    try:
        products, log_z = torch.zeros(1, 16, dtype=dtype, device=device), torch.zeros(1, device=device)
        labels, valid = torch.zeros(1, dtype=torch.int64, device=device), torch.ones(1, dtype=torch.bool, device=device)
        block = TritonBlock(products, None, Targets(labels, valid, 0), dtype, Transform.of(1.0, None), Asked())
        block.statistics()
        block.gradient_(log_z, None, Coefficients(log_z, log_z, None))
    except Exception as failure:
        return f"they do not compile or run ({type(failure).__name__}: {reason_of(failure)})"
    return ""
