"""Partial gradients, summed over the TP group before they are accumulated; summands of partial results.

A gradient is partial on each rank for a replicated parameter that acts on sharded tensors (Qwen3's q_norm and k_norm on
this rank's heads). So it is for the part of a shard that other ranks have too (KV heads, if fewer than ranks). A
gradient hook makes the sum: it fires before the gradient is accumulated, so ZeRO never reduces a partial one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from tp_plugin.collectives import all_reduce_, rank_in
from tp_plugin.errors import TensorParallelError
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh
from tp_plugin.param_info import info_of, update_info

PURPOSE = "partial gradient"


def sum_partial_gradient(param: nn.Parameter, mesh: ParallelMesh) -> None:
    """Sum the gradient of a replicated parameter over the TP group; one all-reduce of its size a backward."""

    def total(grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        all_reduce_(grad, mesh.tp_group, purpose=PURPOSE)
        return grad

    update_info(param, partial_over=mesh)
    _on_gradient(param, total)


def sum_shared_gradient(param: nn.Parameter, layout: ShardLayout, mesh: ParallelMesh) -> None:
    """Sum the gradient of the indices that several ranks hold; one all-reduce of these a backward.

    Every rank of the group takes part, with zeros for indices it does not hold. So no further process groups are
    needed, and the order of collectives is the same on all ranks.
    """
    dim = layout.dim
    if dim is None:
        raise ValueError("a layout without a sharded dimension has nothing that only some ranks share")
    place, offset = {}, 0  # start of each shared interval -> (stop, offset in the buffer)
    for start, stop in layout.shared_intervals():
        place[start] = (stop, offset)
        offset += stop - start
    mine = [
        (local, stop - start, at + start - begin)
        for start, stop, local in layout.shared(mesh.tp_rank)
        for begin, (end, at) in place.items()
        if begin <= start and stop <= end
    ]

    def total(grad: torch.Tensor) -> torch.Tensor:
        shape = (*grad.shape[:dim], offset, *grad.shape[dim + 1 :])
        buffer = grad.new_zeros(shape)
        for local, size, at in mine:
            buffer.narrow(dim, at, size).copy_(grad.narrow(dim, local, size))
        all_reduce_(buffer, mesh.tp_group, purpose=PURPOSE)
        grad = grad.clone()
        for local, size, at in mine:
            grad.narrow(dim, local, size).copy_(buffer.narrow(dim, at, size))
        return grad

    _on_gradient(param, total)


def _on_gradient(param: nn.Parameter, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Hook ``total`` to the gradient of ``param``, once; a frozen parameter may be trained later."""
    if info_of(param).gradient_summed:
        return
    update_info(param, gradient_summed=True)
    trained = param.requires_grad
    param.requires_grad_(True).register_hook(lambda grad: _Total.apply(grad, total))
    param.requires_grad_(trained)


class _Total(torch.autograd.Function):
    """A summed gradient. Its own derivative is refused: it depends on the gradient's use, replicated or per rank."""

    @staticmethod
    def forward(ctx, grad, total):
        ctx.shape = tuple(grad.shape)
        return total(grad)

    @staticmethod
    def backward(ctx, _grad):
        raise TensorParallelError(
            f"the gradient of shape {list(ctx.shape)}, summed over the TP group, has no second "
            "derivative (create_graph=True); differentiate twice by inputs or hidden states."
        )


class _AddOnce(torch.autograd.Function):
    """forward: zeros except on the group's rank 0; backward: identity."""

    @staticmethod
    def forward(ctx, x, first):
        ctx.first = first
        return x.view_as(x) if first else torch.zeros_like(x)

    @staticmethod
    def backward(ctx, grad):
        return _TakeFirst.apply(grad, ctx.first), None


class _TakeFirst(torch.autograd.Function):
    """forward: identity, on tensors equal on all ranks; backward: zeros except on the group's rank 0."""

    @staticmethod
    def forward(ctx, x, first):
        ctx.first = first
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _AddOnce.apply(grad, ctx.first), None


def add_once(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """A replicated summand of a partial result; forward: zeros except on the group's rank 0, backward: identity.

    The incoming gradient is that of the sum over the group, so it is complete on every rank. Any shape.
    """
    return x if group is None else _AddOnce.apply(x, rank_in(group) == 0)
