"""Rows of many shards, packed into one buffer that the ranks of a TP group send to the writer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch

from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh, comm_device
from tp_plugin.param_info import sharded_layout

_ALIGNMENT = 16


@dataclasses.dataclass(frozen=True)
class Span:
    """Rows ``start`` to ``stop`` (of dimension 0) of the full tensor ``name``."""

    name: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class GatherBuffer:
    """This rank's packed rows of a bucket, and, on the writer, a receive buffer for each rank."""

    layouts: Mapping[Span, ShardLayout]
    packed: torch.Tensor
    received: Sequence[torch.Tensor]


@torch.no_grad()
def pack(tensors: Mapping[str, torch.Tensor], spans: Sequence[Span], mesh: ParallelMesh, writer: int) -> GatherBuffer:
    """Allocate all memory of the exchange, and pack this rank's rows of each sharded span."""
    full = {span: sharded_layout(tensors[span.name]) for span in spans}
    layouts = {span: layout.rows(span.start, span.stop) for span, layout in full.items() if layout is not None}
    sizes = [sum(_nbytes(span, of, tensors, rank) for span, of in layouts.items()) for rank in range(mesh.tp_size)]
    device = comm_device(mesh.tp_group)
    packed = torch.empty(sizes[mesh.tp_rank], dtype=torch.uint8, device=device)
    place = 0
    for span, of in layouts.items():
        offset = place
        for start, stop in full[span].local_rows(mesh.tp_rank, span.start, span.stop):  # type: ignore[union-attr]
            piece = tensors[span.name].detach()[start:stop].contiguous().view(-1)
            if piece.numel():
                packed[offset : offset + piece.nbytes].copy_(piece.view(torch.uint8))
            offset += piece.nbytes
        place += _nbytes(span, of, tensors, mesh.tp_rank)
    received = []
    if mesh.tp_rank == writer:
        received = [packed if r == writer else packed.new_empty(size) for r, size in enumerate(sizes)]
    return GatherBuffer(layouts, packed, received)


@torch.no_grad()
def unpack(
    tensors: Mapping[str, torch.Tensor], spans: Sequence[Span], buffer: GatherBuffer
) -> dict[Span, torch.Tensor]:
    """The full rows of each span on the CPU, after the exchange."""
    layouts = buffer.layouts
    shards: dict[Span, list[torch.Tensor]] = {span: [] for span in layouts}
    for rank, received in enumerate(buffer.received):
        place = 0
        for span, of in layouts.items():
            shape, dtype = of.local_shape(rank), tensors[span.name].dtype
            data = received[place : place + math.prod(shape) * dtype.itemsize]
            shards[span].append(data.view(dtype).view(shape))
            place += _nbytes(span, of, tensors, rank)
    found: dict[Span, torch.Tensor] = {}
    for span in spans:
        if span in layouts:
            found[span] = layouts[span].unshard(shards[span]).cpu()
            continue
        tensor = tensors[span.name].detach()
        rows = tensor[span.start : span.stop] if tensor.dim() else tensor.reshape(1)
        found[span] = rows.to("cpu", copy=True).contiguous()
    return found


def _nbytes(span: Span, of: ShardLayout, tensors: Mapping[str, torch.Tensor], rank: int) -> int:
    size = math.prod(of.local_shape(rank)) * tensors[span.name].dtype.itemsize
    return size + -size % _ALIGNMENT
