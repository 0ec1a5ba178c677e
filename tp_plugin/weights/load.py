"""A rank's shards of a model whose parameters have not been read: only what its layouts name comes into memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.distributed as dist
from torch import nn

from tp_plugin.collectives import broadcast_
from tp_plugin.errors import agree, sentence_of
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh
from tp_plugin.sharding.adapters import cut
from tp_plugin.sharding.equal import comm_device
from tp_plugin.weights.unread import Unread


def unread_names(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers that wait to be read, under every name they have."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [name for name, tensor in tensors if isinstance(tensor, Unread)]


@torch.no_grad()
def read_shards(model: nn.Module, layouts: Mapping[str, ShardLayout], mesh: ParallelMesh) -> None:
    """Put this rank's part of every :class:`Unread` parameter and buffer in its place, on the CPU, tied ones once.

    One tensor at a time: beyond the shards at most a window of the file, or the operands of a conversion that
    :mod:`tp_plugin.weights.unread` does not see through, are in memory.

    Args:
        layouts: by parameter name; what is missing is read whole.

    Raises:
        TensorParallelError: a file cannot be read, on this rank alone.
    """
    read: dict[int, torch.Tensor] = {}
    kept = []  # an id stands for one object only while that lives
    for name in unread_names(model):
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        unread = getattr(module, leaf)
        if id(unread) not in read:
            kept.append(unread)
            read[id(unread)] = _read(unread, layouts.get(name), mesh)
        setattr(module, leaf, read[id(unread)])


def _read(unread: Unread, layout: ShardLayout | None, mesh: ParallelMesh) -> torch.Tensor:
    if layout is None:
        layout = ShardLayout.replicated(tuple(unread.shape), mesh.tp_size)
    out = torch.empty(layout.local_shape(mesh.tp_rank), dtype=unread.dtype)
    done = 0
    for index in layout.slices(mesh.tp_rank):
        size = 0 if layout.dim is None else index[layout.dim].stop - index[layout.dim].start
        unread.read_into(out if layout.dim is None else out.narrow(layout.dim, done, size), index)
        done += size
    if isinstance(unread, nn.Parameter):
        out = nn.Parameter(out, unread.requires_grad)
    notes = {key: value for key, value in vars(unread).items() if key not in ("source", "_is_param")}
    out.__dict__.update(notes)  # transformers notes on a tensor that it need not be initialised
    return out


@torch.no_grad()
def share_new(model: nn.Module, names: Collection[str], layouts: Mapping[str, ShardLayout], mesh: ParallelMesh) -> None:
    """Give all ranks the world's first rank's tensors of these names, which no checkpoint had, then cut them.

    A collective call. Ranks may have been seeded differently, and would each have drawn another head.

    Raises:
        TensorParallelError: on every rank, when one has no memory for what is sent.
    """
    tensors = dict(model.named_parameters())
    for name in [name for name in tensors if name in names]:
        if dist.is_initialized() and dist.get_world_size() > 1:
            sent, error = tensors[name].data, None
            try:
                sent = sent.to(comm_device(dist.group.WORLD)).contiguous()
            except Exception as failure:  # out of memory: nobody may wait for this rank in the broadcast
                error = f"bringing {name!r}, which the checkpoint lacks, to all ranks failed: {sentence_of(failure)}"
            agree(error)
            broadcast_(sent, dist.group.WORLD, purpose="new parameters")
            tensors[name].data.copy_(sent)
        if name in layouts:
            cut(tensors[name], layouts[name], mesh)
