"""Full tensors from shards, all of them in one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tp_plugin.errors import TensorParallelError, agree, sentence_of
from tp_plugin.mesh import ParallelMesh
from tp_plugin.sharding.state import state_of
from tp_plugin.weights.stream import Output, between_steps, full_shape, identities, persistent, stream


def full_state_dict(
    model_or_engine: nn.Module | Any, *, trainable_only: bool = False, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Full tensors under HF names, on the CPU of global rank 0; ``{}`` on every other rank. A collective call.

    Works at every ZeRO stage. Persistent buffers are included; tied parameters are one tensor under each of their
    names. Training goes on afterwards with the very same parameters. Where the model is too large for the memory of
    one host, :func:`tp_plugin.save_pretrained` writes it without gathering it.

    Args:
        model_or_engine: a sharded model, or the DeepSpeed engine (or other wrapper with ``.module``) around it.
        trainable_only: leave out parameters that are not trained.
        dtype: cast floating-point tensors; None keeps each as it is.

    Returns:
        name -> tensor, shaped as in the unsharded model, in the order of ``state_dict()``.

    Raises:
        TensorParallelError: on every rank, when one of them could not gather (out of memory, most often).
    """
    tensors = persistent(unwrapped(model_or_engine))
    if trainable_only:
        tensors = {n: t for n, t in tensors.items() if isinstance(t, nn.Parameter) and t.requires_grad}
    return gathered(model_or_engine, tensors, dtype=dtype)


def gathered(
    model_or_engine: nn.Module | Any, tensors: Mapping[str, torch.Tensor], *, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """:func:`full_state_dict` of some tensors of the model, name -> this rank's."""
    whole: dict[int, torch.Tensor] = {}

    def keep(output: Output, rows: torch.Tensor, start: int) -> None:
        to = dtype if dtype is not None and output.dtype.is_floating_point else output.dtype
        if start == 0:
            whole[id(tensors[output.name])] = torch.empty(output.shape, dtype=to)
        whole[id(tensors[output.name])].view(-1)[start : start + rows.numel()].copy_(rows)

    model, error = unwrapped(model_or_engine), None
    with between_steps(model_or_engine):
        try:
            stream(tensors, identities(tensors), mesh_of(model), replica=0, writer=0, sink=keep)
        except Exception as failure:
            if state_of(model) is None:  # a call that may be one rank's own
                raise
            error = f"gathering the full tensors failed: {sentence_of(failure)}"
    if state_of(model) is not None:
        agree(error)  # other replicas took no part, and would wait for these ranks later
    if dist.is_initialized() and dist.get_rank() != 0:
        return {}
    return {name: whole.get(id(tensor), tensor) for name, tensor in tensors.items()}  # one without elements is whole


def refuse_shards(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise where ``state``, given to be saved as the state of a sharded ``model``, has shards for full tensors.

    Names are the model's, or those under which PEFT saves them.

    Raises:
        TensorParallelError: on this rank, which may be the only one that saves.
    """
    adapters = set(getattr(model, "peft_config", None) or ()) | _WRAPPERS

    def plain(name: str) -> str:
        bare = ".".join(part for part in name.split(".") if part not in adapters)
        return bare.removeprefix("base_model.model.")

    params: dict[str, list[nn.Parameter]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        params.setdefault(plain(name), []).append(param)
    for name, tensor in state.items():
        shape = tuple(getattr(tensor, "shape", ()))
        known = [param for param in params.get(plain(name), ()) if full_shape(param) != tuple(param.shape)]
        if any(shape == tuple(param.shape) for param in known) and all(shape != full_shape(param) for param in known):
            raise TensorParallelError(
                f"state_dict= holds this rank's shard {list(shape)} of {name!r}, which is {list(full_shape(known[0]))} "
                "in the whole model; call tp_plugin.save_pretrained(model, directory) on every rank, or pass what "
                "tp_plugin.full_state_dict(model) returns."
            )


_WRAPPERS = {"module", "_orig_mod", "base_layer", "original_module", "modules_to_save"}
"""Parts of names that wrappers and adapters put in."""


def mesh_of(model: nn.Module) -> ParallelMesh:
    """The mesh a model is sharded over; one rank, in as many replicas as there are processes, when it is not."""
    record = state_of(model)
    if record is not None:
        return record.mesh
    if not dist.is_initialized():
        return ParallelMesh.single()
    return ParallelMesh(None, None, dp_rank=dist.get_rank(), dp_size=dist.get_world_size())


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
