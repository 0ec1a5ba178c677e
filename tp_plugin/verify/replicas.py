"""Replicas of a parameter on the ranks of a TP group: equal to the bit, or training has gone wrong."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tp_plugin.collectives import all_gather, all_reduce_
from tp_plugin.errors import TensorParallelError
from tp_plugin.layout import Interval, ShardLayout
from tp_plugin.mesh import ParallelMesh
from tp_plugin.sharding.equal import comm_device, fingerprint

PURPOSE = "replica check"
_NOT_HELD = 0  # the fingerprint of nothing


@torch.no_grad()
def require_equal_replicas(model: nn.Module, mesh: ParallelMesh) -> None:
    """Compare what several ranks of the TP group hold: replicated parameters and buffers, shared KV heads.

    Costs a hash of what is replicated, one all-gather of a number for each over the TP group, and one small
    all-reduce. A collective call over the world; under ZeRO-3 shared heads are gathered over data parallelism.

    Raises:
        TensorParallelError: on every rank, naming the first tensor that differs.
    """
    if mesh.tp_group is None:
        return
    names: list[str] = []
    prints: list[torch.Tensor] = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        layout: ShardLayout | None = getattr(tensor, "tp_layout", None)
        if layout is None or not layout.is_sharded:
            names.append(name)
            prints.append(fingerprint(getattr(tensor, "ds_tensor", tensor)))
            continue
        shared = [piece for piece in _pieces(layout) if _holders(layout, piece) > 1]
        if shared:
            names += [name] * len(shared)
            prints += _shared_prints(tensor, layout, mesh.tp_rank, shared)
    if not prints:
        return
    device = comm_device(mesh.tp_group)
    mine = torch.stack([one.to(device) for one in prints])
    everyone = torch.stack(all_gather(mine, mesh.tp_group, purpose=PURPOSE))
    # a rank that does not hold a shared head has nothing to compare
    held = everyone != _NOT_HELD
    reference = everyone.gather(0, held.int().argmax(0, keepdim=True))
    differs = (held & (everyone != reference)).any(0)
    first = torch.where(differs, torch.arange(len(names), device=device), len(names)).amin()
    bounds = torch.stack([first, -differs.sum()])
    all_reduce_(bounds, dist.group.WORLD, op=dist.ReduceOp.MIN, purpose=PURPOSE)
    place, count = int(bounds[0]), -int(bounds[1])
    if count:
        raise TensorParallelError(
            f"{names[place]!r} is not the same on the ranks of a tensor-parallel group, which must hold equal replicas "
            f"({count} such tensors); something changed it on one rank only, start again from the last checkpoint."
        )


def _pieces(layout: ShardLayout) -> list[Interval]:
    """Runs of the sharded dimension that a rank holds wholly or not at all."""
    ends = sorted({end for part in layout.parts for interval in part for end in interval})
    return list(itertools.pairwise(ends))


def _local(layout: ShardLayout, rank: int, piece: Interval) -> int | None:
    """Where the shard of ``rank`` has the piece; None if it has not."""
    local = 0
    for start, stop in layout.parts[rank]:
        if start <= piece[0] < stop:
            return local + piece[0] - start
        local += stop - start
    return None


def _holders(layout: ShardLayout, piece: Interval) -> int:
    return sum(_local(layout, rank, piece) is not None for rank in range(layout.ranks))


def _shared_prints(tensor: Any, layout: ShardLayout, rank: int, pieces: list[Interval]) -> list[torch.Tensor]:
    context: contextlib.AbstractContextManager = contextlib.nullcontext()
    if hasattr(tensor, "ds_id"):
        import deepspeed

        context = deepspeed.zero.GatheredParameters([tensor])
    found = []
    with context:
        for start, stop in pieces:
            local = _local(layout, rank, (start, stop))
            if local is None:
                found.append(torch.full((), _NOT_HELD, dtype=torch.int64, device=tensor.device))
                continue
            one = fingerprint(tensor.detach().narrow(layout.dim or 0, local, stop - start))
            found.append(torch.where(one == _NOT_HELD, one + 1, one))
    return found
