"""Compare replicas of parameters on the ranks of a TP group: equal, but for kernels that add in no fixed order."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tp_plugin import log
from tp_plugin.collectives import all_gather, all_reduce_
from tp_plugin.errors import TensorParallelError
from tp_plugin.layout import Interval, ShardLayout
from tp_plugin.mesh import ParallelMesh, comm_device
from tp_plugin.param_info import sharded_layout
from tp_plugin.partitioned import gathered, is_partitioned, own_partition
from tp_plugin.sharding.sync_params import fingerprint
from tp_plugin.weights.gather import between_forwards

PURPOSE = "replica check"
_NOT_HELD = 0  # fingerprint of a replica that this rank lacks

DRIFT = 1e-2
"""Largest distance between replicas, relative to their norm, that is a warning and no error. Some GPU kernels add in no
fixed order, and the gradients of two replicas then differ by rounding."""
CAUSES = (
    "look for a loss that reads a sharded weight by itself (use the model's outputs), or code that writes a parameter "
    "on one rank: a norm of one rank's gradients does so too (use torch.nn.utils.clip_grad_norm_)"
)
"""Possible causes of a difference, whose cause is not seen itself."""
_OF_KERNELS = ", or kernels that add in no fixed order"
_WARNED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclasses.dataclass(frozen=True)
class _Replica:
    """A tensor, or a piece of a sharded one, that several ranks hold."""

    name: str
    tensor: Any
    layout: ShardLayout | None = None
    piece: Interval = (0, 0)

    def here(self, rank: int) -> torch.Tensor | None:
        """This rank's values; None if it has none. Under ZeRO-3 it needs the parameter gathered."""
        if self.layout is None:
            return own_partition(self.tensor).detach()
        local = _local(self.layout, rank, self.piece)
        if local is None:
            return None
        return self.tensor.detach().narrow(self.layout.dim or 0, local, self.piece[1] - self.piece[0])

    @property
    def partitioned(self) -> bool:
        """True for a shared piece of a ZeRO-3 parameter, which must be gathered to be read."""
        return self.layout is not None and is_partitioned(self.tensor)

    def gathered(self) -> contextlib.AbstractContextManager:
        """Gather a shared piece of a ZeRO-3 parameter while open; collective over the data-parallel group."""
        return gathered([self.tensor]) if self.partitioned else contextlib.nullcontext()


def is_turn(forwards: int, every: int) -> bool:
    """Return True if replicas are compared before the training forward that follows ``forwards`` others.

    They are before the first, the 1st, 2nd, 4th, 8th... after it, since drift shows in the first steps, and every
    ``every``.
    """
    return every > 0 and (forwards % every == 0 or (forwards < every and forwards.bit_count() == 1))


@torch.no_grad()
def require_equal_replicas(model: nn.Module, mesh: ParallelMesh, *, partitioned: bool = True) -> None:
    """Compare replicas over the TP group: replicated parameters and buffers, shared KV heads.

    It costs a hash of each, an all-gather of one number each over the TP group, and one small all-reduce. Only
    replicas whose hashes differ are measured. A collective call over the world. Under ZeRO-3 it gathers shared heads
    over data parallelism, and releases prefetched parameters for it.

    Args:
        partitioned: False leaves out shared heads that would have to be gathered.

    Raises:
        TensorParallelError: on every rank, naming the tensor that differs most, if that is more than :data:`DRIFT`.
    """
    if mesh.tp_group is None:
        return
    replicas = [replica for replica in _replicas(model) if partitioned or not replica.partitioned]
    if not replicas:
        return
    gathers = any(replica.partitioned for replica in replicas)
    with between_forwards(model) if gathers else contextlib.nullcontext():
        _require_equal(model, mesh, replicas)


def _require_equal(model: nn.Module, mesh: ParallelMesh, replicas: list[_Replica]) -> None:
    device = comm_device(mesh.tp_group)
    prints = []
    for replica in replicas:
        with replica.gathered():
            here = replica.here(mesh.tp_rank)
            one = torch.full((), _NOT_HELD, dtype=torch.int64) if here is None else fingerprint(here)
        prints.append(one.to(device) if here is None else torch.where(one == _NOT_HELD, one + 1, one).to(device))
    everyone = torch.stack(all_gather(torch.stack(prints), mesh.tp_group, purpose=PURPOSE))
    # a rank that does not hold a shared head has nothing to compare
    held = everyone != _NOT_HELD
    reference = everyone.gather(0, held.int().argmax(0, keepdim=True))
    apart_here = held & (everyone != reference)
    differs = apart_here.any(0).to(torch.int32)
    all_reduce_(differs, dist.group.WORLD, op=dist.ReduceOp.MAX, purpose=PURPOSE)
    apart = differs.nonzero().flatten().tolist()
    if not apart:
        return
    distances = torch.stack([_distance(replicas[place], mesh) for place in apart])
    all_reduce_(distances, dist.group.WORLD, op=dist.ReduceOp.MAX, purpose=PURPOSE)
    worst = int(distances.argmax())
    name, far = replicas[apart[worst]].name, float(distances[worst])
    ranks = named_ranks(bool(apart_here[mesh.tp_rank, apart[worst]]), device)
    if not far <= DRIFT:
        raise TensorParallelError(
            f"{name!r} is not the same on the ranks of a tensor-parallel group, which must hold equal replicas: "
            f"on {ranks} it differs from the first of the group by {far:.2g} of its norm, and {len(apart) - 1} more "
            f"differ: {CAUSES}; then start again from the last checkpoint."
        )
    if model not in _WARNED:
        _WARNED.add(model)
        log.warning(
            f"{len(apart)} replicas differ between the ranks of a tensor-parallel group by up to "
            f"{far:.1g} of their norm ({name!r} on {ranks}): training goes on while it is less than {DRIFT:g}: "
            f"{CAUSES}{_OF_KERNELS if next(model.parameters()).device.type != 'cpu' else ''}.",
        )


def named_ranks(here: bool, device: torch.device) -> str:
    """Name the ranks of the world that pass True; a collective call."""
    flags = torch.zeros(dist.get_world_size(), dtype=torch.int32, device=device)
    flags[dist.get_rank()] = here
    all_reduce_(flags, dist.group.WORLD, op=dist.ReduceOp.MAX, purpose=PURPOSE)
    found = flags.nonzero().flatten().tolist()
    return f"rank{'s' * (len(found) > 1)} {', '.join(map(str, found))}"


def _distance(replica: _Replica, mesh: ParallelMesh) -> torch.Tensor:
    """Norm of the spread over the TP group, relative to the norm; infinite for integers."""
    device = comm_device(mesh.tp_group)
    with replica.gathered():
        here = replica.here(mesh.tp_rank)
        if not replica.tensor.is_floating_point():
            return torch.full((), float("inf"), device=device)
        if here is None:
            assert replica.layout is not None
            shape = list(replica.layout.local_shape(mesh.tp_rank))
            shape[replica.layout.dim or 0] = replica.piece[1] - replica.piece[0]
            low, high = torch.full(shape, float("inf")), torch.full(shape, float("-inf"))
        else:
            low, high = here.float().clone(), here.float().clone()
    low, high = low.to(device).contiguous(), high.to(device).contiguous()
    all_reduce_(low, mesh.tp_group, op=dist.ReduceOp.MIN, purpose=PURPOSE)
    all_reduce_(high, mesh.tp_group, op=dist.ReduceOp.MAX, purpose=PURPOSE)
    found = (high - low).norm() / high.norm().clamp_min(1e-12)
    return torch.where(found.isnan(), torch.full_like(found, float("inf")), found)


def _replicas(model: nn.Module) -> list[_Replica]:
    found = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        layout = sharded_layout(tensor)
        if layout is None:
            found.append(_Replica(name, tensor))
        else:
            shared = [piece for piece in _pieces(layout) if _holders(layout, piece) > 1]
            found += [_Replica(name, tensor, layout, piece) for piece in shared]
    return found


def _pieces(layout: ShardLayout) -> list[Interval]:
    """Intervals of the sharded dimension that each rank has either complete or not at all."""
    ends = sorted({end for part in layout.parts for interval in part for end in interval})
    return list(itertools.pairwise(ends))


def _local(layout: ShardLayout, rank: int, piece: Interval) -> int | None:
    """Offset of the piece in the shard of ``rank``; None if it has none of it."""
    local = 0
    for start, stop in layout.parts[rank]:
        if start <= piece[0] < stop:
            return local + piece[0] - start
        local += stop - start
    return None


def _holders(layout: ShardLayout, piece: Interval) -> int:
    return sum(_local(layout, rank, piece) is not None for rank in range(layout.ranks))
