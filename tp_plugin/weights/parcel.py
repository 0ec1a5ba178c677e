"""What the ranks of a TP group send to the one that wants full tensors: their rows of many, packed into one buffer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch

from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh
from tp_plugin.sharding.equal import comm_device

_ALIGNMENT = 16


@dataclasses.dataclass(frozen=True)
class Span:
    """Rows ``start`` to ``stop`` (of dimension 0) of the full tensor ``name``."""

    name: str
    start: int
    stop: int


def sharded_layout(tensor: torch.Tensor) -> ShardLayout | None:
    """The layout of a tensor of which this rank holds a shard; None for one that it holds whole."""
    layout: ShardLayout | None = getattr(tensor, "tp_layout", None)
    return layout if layout is not None and layout.is_sharded else None


@dataclasses.dataclass(frozen=True)
class Parcel:
    """What this rank sends of a bucket, and, on the writer, room for what it receives of each rank."""

    cut: Mapping[Span, ShardLayout]
    packed: torch.Tensor
    received: Sequence[torch.Tensor]


@torch.no_grad()
def pack(tensors: Mapping[str, torch.Tensor], spans: Sequence[Span], mesh: ParallelMesh, writer: int) -> Parcel:
    """All memory that the exchange takes, and this rank's rows of each span that is cut."""
    layouts = {span: sharded_layout(tensors[span.name]) for span in spans}
    cut = {span: layout.rows(span.start, span.stop) for span, layout in layouts.items() if layout is not None}
    sizes = [sum(_room(span, of, tensors, rank) for span, of in cut.items()) for rank in range(mesh.tp_size)]
    device = comm_device(mesh.tp_group)
    packed = torch.empty(sizes[mesh.tp_rank], dtype=torch.uint8, device=device)
    place = 0
    for span, of in cut.items():
        offset = place
        for start, stop in layouts[span].local_rows(mesh.tp_rank, span.start, span.stop):  # type: ignore[union-attr]
            piece = tensors[span.name].detach()[start:stop].contiguous().view(-1)
            if piece.numel():
                packed[offset : offset + piece.nbytes].copy_(piece.view(torch.uint8))
            offset += piece.nbytes
        place += _room(span, of, tensors, mesh.tp_rank)
    received = []
    if mesh.tp_rank == writer:
        received = [packed if r == writer else packed.new_empty(size) for r, size in enumerate(sizes)]
    return Parcel(cut, packed, received)


@torch.no_grad()
def unpack(tensors: Mapping[str, torch.Tensor], spans: Sequence[Span], parcel: Parcel) -> dict[Span, torch.Tensor]:
    """The full rows of each span on the CPU, once they have been exchanged."""
    cut = parcel.cut
    shards: dict[Span, list[torch.Tensor]] = {span: [] for span in cut}
    for rank, received in enumerate(parcel.received):
        place = 0
        for span, of in cut.items():
            shape, dtype = of.local_shape(rank), tensors[span.name].dtype
            data = received[place : place + math.prod(shape) * dtype.itemsize]
            shards[span].append(data.view(dtype).view(shape))
            place += _room(span, of, tensors, rank)
    found: dict[Span, torch.Tensor] = {}
    for span in spans:
        if span in cut:
            found[span] = cut[span].unshard(shards[span]).cpu()
            continue
        tensor = tensors[span.name].detach()
        rows = tensor[span.start : span.stop] if tensor.dim() else tensor.reshape(1)
        found[span] = rows.to("cpu", copy=True).contiguous()
    return found


def _room(span: Span, of: ShardLayout, tensors: Mapping[str, torch.Tensor], rank: int) -> int:
    size = math.prod(of.local_shape(rank)) * tensors[span.name].dtype.itemsize
    return size + -size % _ALIGNMENT
