"""Gradients that are only partial on each rank, summed before anybody else sees them; summands of partial results.

Two kinds of parameter have them: replicated ones that act on sharded tensors (Qwen3's q_norm and k_norm on this rank's
heads), and the part of a shard that other ranks hold too (KV heads when there are fewer than ranks). The sum is made in
a gradient hook, which fires before the gradient is accumulated, so ZeRO never reduces a partial one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from tp_plugin.collectives import all_reduce_, rank_in
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh

PURPOSE = "partial gradient"  # what the counter of collectives files these under


def sum_partial_gradient(param: nn.Parameter, mesh: ParallelMesh) -> None:
    """Sum the gradient of a replicated parameter over the TP group; one all-reduce of its size a backward."""

    def total(grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        all_reduce_(grad, mesh.tp_group, purpose=PURPOSE)
        return grad

    param.tp_partial_over = mesh  # type: ignore[attr-defined]
    _on_gradient(param, total)


def sum_shared_gradient(param: nn.Parameter, layout: ShardLayout, mesh: ParallelMesh) -> None:
    """Sum the gradient of what several ranks hold of a shard; one all-reduce of the shared indices a backward.

    Every rank of the group takes part, with zeros for indices it does not hold, so no further process groups are
    needed and the order of collectives is the same everywhere.
    """
    dim = layout.dim
    if dim is None:
        raise ValueError("a layout without a sharded dimension has nothing that only some ranks share")
    place, offset = {}, 0  # start of each shared interval -> where it lies in the buffer
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
    """Hook ``total`` to the gradient of ``param``, once, whether it is trained already or perhaps later."""
    if getattr(param, "tp_summed", False):
        return
    param.tp_summed = True  # type: ignore[attr-defined]
    trained = param.requires_grad
    param.requires_grad_(True).register_hook(total)
    param.requires_grad_(trained)


class _AddOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, first):
        return x.view_as(x) if first else torch.zeros_like(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def add_once(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """A replicated summand of a partial result: itself on the group's first rank, zeros on the others. Any shape.

    Backward is the identity on every rank: what it is added to is summed over the group, so the gradient that arrives
    is already whole.
    """
    return x if group is None else _AddOnce.apply(x, rank_in(group) == 0)
