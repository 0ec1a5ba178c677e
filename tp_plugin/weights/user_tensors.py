"""Parameters and gradients that a caller passes as tensors: their layouts, norm and full tensors.

A tensor is recognised by its memory: ``param``, ``param.grad``, their ``detach()`` and views of all elements are known.
A copy is not.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from tp_plugin.collectives import all_gather, all_reduce_
from tp_plugin.errors import TensorParallelError
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh
from tp_plugin.param_info import info_of, sharded_layout
from tp_plugin.sharding import sharded_models, state_of
from tp_plugin.sharding.sync_params import comm_device

PURPOSE = "norm of shards"


@dataclasses.dataclass(frozen=True)
class Ownership:
    """A tensor of a sharded model: a parameter, or the gradient of one.

    Attributes:
        layout: of its shards; None for a replicated tensor.
    """

    param: torch.Tensor
    mesh: ParallelMesh
    layout: ShardLayout | None

    def owned(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The pieces of this rank's ``tensor`` that no lower rank has."""
        assert self.layout is not None
        rank, dim = self.mesh.tp_rank, self.layout.dim or 0
        shard = tensor.reshape(self.layout.local_shape(rank))
        return [shard.narrow(dim, local, stop - start) for start, stop, local in self.layout.owned(rank)]


def ownership_of(tensors: Sequence[torch.Tensor]) -> list[Ownership | None]:
    """The owner of each tensor; None for one of no sharded model of this process. No collective call."""
    known: dict[object, Ownership] = {}
    for model in sharded_models():
        record = state_of(model)
        if record is None or record.mesh.tp_group is None:
            continue
        for param in model.parameters():
            found = Ownership(param, record.mesh, sharded_layout(param))
            known |= dict.fromkeys((*_keys(param), *(() if param.grad is None else _keys(param.grad))), found)
    if not known:
        return [None] * len(tensors)
    return [next((known[key] for key in _keys(tensor) if key in known), None) for tensor in tensors]


def _keys(tensor: torch.Tensor) -> tuple[object, ...]:
    """Keys of a tensor: the object, and its memory if it has any."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or not tensor.numel() or tensor.device.type == "meta":
        return (id(tensor),)
    return id(tensor), (tensor.device, tensor.data_ptr(), tensor.numel())


@torch.no_grad()
def total_norm(
    tensors: Sequence[torch.Tensor], norm_type: float, plain: Callable[[list[torch.Tensor]], torch.Tensor]
) -> torch.Tensor | None:
    """The ``norm_type``-norm of the full tensors as of one vector, 0-dim, equal on all ranks of the TP group.

    Every element is counted once: one in a shard by its owner, summed by one all-reduce of a number over the group, and
    one in a replicated tensor locally.

    Args:
        plain: computes the norm of full tensors.

    Returns:
        None if no tensor is a shard of a sharded model.

    Raises:
        TensorParallelError: the norm is neither a sum of powers nor a maximum.
    """
    places = ownership_of(tensors)
    shards = [(tensor, place) for tensor, place in zip(tensors, places, strict=True) if place and place.layout]
    if not shards:
        return None
    if norm_type <= 0:
        raise TensorParallelError(
            f"norms of order {norm_type} are unsupported for a sharded model's parameters or gradients; use an order "
            "above 0."
        )
    group, first = shards[0][1].mesh.tp_group, tensors[0]
    pieces = [piece for tensor, place in shards for piece in place.owned(tensor) if piece.numel()]
    wide = functools.reduce(torch.promote_types, [piece.dtype for piece in pieces], torch.float32)
    norms = [torch.linalg.vector_norm(piece, norm_type, dtype=wide).to(first.device) for piece in pieces]
    own = torch.stack(norms) if norms else torch.zeros(1, dtype=wide, device=first.device)
    wide_as_all = torch.zeros(2, dtype=torch.float64, device=comm_device(group))  # the ranks' dtypes may differ
    if math.isinf(norm_type):
        wide_as_all[0], wide_as_all[1] = own.nan_to_num(nan=0.0, posinf=math.inf).max(), own.isnan().any()
        all_reduce_(wide_as_all, group, op=dist.ReduceOp.MAX, purpose=PURPOSE)
        whole = torch.where(wide_as_all[1] > 0, math.nan, wide_as_all[0])
    else:
        wide_as_all[0] = own.double().pow(norm_type).sum()
        all_reduce_(wide_as_all, group, purpose=PURPOSE)
        whole = wide_as_all[0].pow(1 / norm_type)
    rest = [tensor for tensor, place in zip(tensors, places, strict=True) if not (place and place.layout)]
    parts = [whole.to(first.device)] + ([plain(rest).to(first.device).double()] if rest else [])
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
    return torch.linalg.vector_norm(torch.stack(parts), norm_type).to(dtype)


def unsharded(tensor: torch.Tensor, place: Ownership | None) -> torch.Tensor:
    """The full tensor of ``tensor``, differentiable; for a shard a collective call over the TP group.

    The gradient of the result must be equal on all ranks. If gradients of the parameter are summed over the group, only
    the owner of an element gets its gradient.
    """
    if place is None or (place.layout is None and not info_of(place.param).gradient_summed):
        return tensor
    return _Unsharded.apply(tensor, place)


def counts_once(node: object) -> bool:
    """Return True for an autograd node of :func:`unsharded`, whose gradient of a parameter needs no sum over ranks."""
    return isinstance(node, _Unsharded._backward_cls)


class _Unsharded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, place):
        ctx.place = place
        layout, mesh = place.layout, place.mesh
        if layout is None:
            return tensor.clone()
        sizes = [layout.local_size(rank) for rank in range(layout.ranks)]
        sent = tensor.reshape(layout.local_shape(mesh.tp_rank)).to(comm_device(mesh.tp_group))
        parts = all_gather(sent, mesh.tp_group, purpose=PURPOSE, sizes=sizes, dim=layout.dim or 0)
        return layout.unshard(parts).to(tensor.device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        layout, rank = ctx.place.layout, ctx.place.mesh.tp_rank
        if layout is None:  # replicated, with a gradient that is summed over the group
            return grad if rank == 0 else torch.zeros_like(grad), None
        back = grad.new_zeros(layout.local_shape(rank))
        for start, stop, local in layout.owned(rank):
            piece = grad.narrow(layout.dim or 0, start, stop - start)
            back.narrow(layout.dim or 0, local, stop - start).copy_(piece)
        return back, None
