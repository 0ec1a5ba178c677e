"""Full tensors from shards: what every export starts from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tp_plugin.collectives import all_gather
from tp_plugin.errors import TensorParallelError
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh
from tp_plugin.sharding.state import state_of


def full_state_dict(
    model_or_engine: nn.Module | Any, *, trainable_only: bool = False, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Full tensors under HF names, on the CPU of global rank 0; ``{}`` on every other rank. A collective call.

    Works at every ZeRO stage: a partitioned parameter is made whole over its data-parallel group first, then over its
    tensor-parallel group, one parameter at a time. Persistent buffers are included; tied parameters are one tensor
    under each of their names. Training goes on afterwards with the very same parameters.

    Args:
        model_or_engine: a sharded model, or the DeepSpeed engine (or other wrapper with ``.module``) around it.
        trainable_only: leave out parameters that are not trained.
        dtype: cast floating-point tensors; None keeps each as it is.

    Returns:
        name -> tensor, shaped as in the unsharded model, in the order of ``state_dict()``.
    """
    model = unwrapped(model_or_engine)
    record = state_of(model)
    mesh = record.mesh if record is not None else ParallelMesh.single()
    first = not dist.is_initialized() or dist.get_rank() == 0
    with _between_steps(model_or_engine):
        whole: dict[str, torch.Tensor] = {}
        known: dict[int, torch.Tensor] = {}
        for name, tensor in _persistent(model):
            if trainable_only and not (isinstance(tensor, nn.Parameter) and tensor.requires_grad):
                continue
            if id(tensor) not in known:
                full = _whole(tensor, mesh)
                if full.is_floating_point() and dtype is not None:
                    full = full.to(dtype)
                known[id(tensor)] = full.to("cpu", copy=True) if first else torch.empty(0)
            if first:
                whole[name] = known[id(tensor)]
    return whole


def unwrapped(model_or_engine: nn.Module | Any) -> nn.Module:
    """The HF model inside DeepSpeed's engine, a DDP or a compiled wrapper."""
    model = model_or_engine
    while isinstance(model, nn.Module):
        # children by name: an engine answers for every attribute of the model inside it
        inner = model._modules.get("_orig_mod") or model._modules.get("module")
        if inner is None:
            return model
        model = inner
    raise TensorParallelError(f"expected a model or a DeepSpeed engine, got {type(model).__name__}.")


def _persistent(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers under every name they have; the very objects, not detached copies."""
    return list(model.state_dict(keep_vars=True).items())


@torch.no_grad()
def _whole(tensor: torch.Tensor, mesh: ParallelMesh) -> torch.Tensor:
    layout: ShardLayout | None = getattr(tensor, "tp_layout", None)
    with _unpartitioned(tensor):
        if layout is None or not layout.is_sharded:
            return tensor.detach().clone()
        if mesh.dp_rank != 0:  # another replica's ranks: the first one's are enough
            return tensor.detach()[:0]
        sizes = [layout.local_size(rank) for rank in range(layout.ranks)]
        parts = all_gather(tensor.detach(), mesh.tp_group, purpose="export", sizes=sizes, dim=layout.dim or 0)
        return layout.unshard(parts) if mesh.tp_rank == 0 else parts[0][:0]


def _unpartitioned(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """ZeRO-3 parameters are gathered over their data-parallel group inside this context."""
    if not hasattr(tensor, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor])


@contextlib.contextmanager
def _between_steps(engine: Any) -> Iterator[None]:
    """ZeRO-3 releases what it prefetched before parameters are gathered one by one, and resumes after."""
    optimizer: Any = getattr(engine, "optimizer", None)
    if hasattr(optimizer, "checkpoint_event_prologue"):
        optimizer.checkpoint_event_prologue()
    try:
        yield
    finally:
        if hasattr(optimizer, "checkpoint_event_epilogue"):
            optimizer.checkpoint_event_epilogue()
