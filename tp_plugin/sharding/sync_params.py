"""Equal parameters on all ranks of a TP group before sharding, and equal buffers on all ranks of the world.

What differs is taken from the first rank of a group.

Ranks that were seeded differently would otherwise train slices of different models without an error. DDP synchronises
parameters for the same reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

import torch
import torch.distributed as dist
from torch import nn

from tp_plugin.collectives import all_gather, broadcast_
from tp_plugin.errors import TensorParallelError, agree, sentence_of
from tp_plugin.mesh import ParallelMesh, comm_device

_CHUNK = 1 << 22  # elements hashed at a time, so that temporaries stay small
_INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """A hash of every bit of ``tensor`` and its position: int64, 0-dim, on its device, without a host synchronisation.

    A weighted sum of the elements' bit patterns modulo 2^64, chunk by chunk: equal tensors give equal numbers on
    every device.
    """
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    flat = tensor.detach().contiguous().view(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).view(-1)
    bits = flat.view(_INT_OF_SIZE[flat.element_size()]) if flat.dtype != torch.bool else flat.to(torch.uint8)
    weights = torch.arange(1, min(_CHUNK, max(bits.numel(), 1)) + 1, device=tensor.device) * 2 + 1
    for chunk in bits.split(_CHUNK):
        part = (chunk.to(torch.int64) * weights[: chunk.numel()]).sum()
        total = total * 6364136223846793005 + part + chunk.numel()
    return total


def sync_params(model: nn.Module, mesh: ParallelMesh, *, leaving: Collection[str] = ()) -> list[str]:
    """Give every rank the parameters of the first of its TP group, and all the same buffers; collective over the world.

    Costs a hash of the model and one small all-gather where they are equal already; only what differs is sent.

    Args:
        leaving: names of tensors to skip, because they are shards.

    Returns:
        names of the tensors that differed.

    Raises:
        TensorParallelError: the models differ in names, shapes, dtypes or ``requires_grad``.
    """
    buffers = dict(model.named_buffers())
    tensors = dict(model.named_parameters()) | buffers
    found = equalise({name: tensor for name, tensor in tensors.items() if name not in leaving}, mesh)
    if buffers and mesh.tp_group is not None and mesh.dp_group is not None:  # DeepSpeed equalises parameters alone
        found += [name for name in taken_from_first(buffers, mesh.dp_group) if name not in found]
    return found


@torch.no_grad()
def equalise(tensors: Mapping[str, torch.Tensor], mesh: ParallelMesh) -> list[str]:
    """As :func:`sync_params`, for tensors by name."""
    if mesh.tp_group is None:
        return []
    require_alike(tensors)
    if not tensors:
        return []
    return taken_from_first(tensors, mesh.tp_group)


@torch.no_grad()
def taken_from_first(tensors: Mapping[str, torch.Tensor], group: dist.ProcessGroup) -> list[str]:
    """Give every rank of ``group`` the tensors of its first one; the names of those that differed."""
    device = comm_device(group)
    prints, error = torch.empty(0), None
    try:
        prints = torch.stack([fingerprint(tensor).to(device) for tensor in tensors.values()])
    except Exception as failure:  # out of memory, say: no rank may wait for this one
        error = f"comparing the ranks' models failed: {sentence_of(failure)}"
    agree(error)
    everyone = all_gather(prints, group, purpose="equal parameters")
    differs = torch.stack([other != everyone[0] for other in everyone]).any(0)
    names = [name for name, different in zip(tensors, differs.tolist(), strict=True) if different]
    for name in names:
        value = tensors[name].detach().to(device).contiguous()
        broadcast_(value, group, purpose="equal parameters")
        tensors[name].data.copy_(value)
    return names


def require_alike(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise TensorParallelError on every rank unless names, shapes, dtypes and requires_grad are the same on all.

    Over the world: DeepSpeed makes data-parallel ranks equal, and would hang on other shapes.
    """
    shape = [(name, tuple(t.shape), str(t.dtype), t.requires_grad) for name, t in tensors.items()]
    shapes: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(shapes, hashlib.sha256(str(shape).encode()).digest())
    if any(other != shapes[0] for other in shapes):
        raise TensorParallelError(
            "the ranks built different models (names, shapes, dtypes or requires_grad of their parameters); build the "
            "same model on every rank."
        )
