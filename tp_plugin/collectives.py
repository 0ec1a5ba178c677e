"""Collectives over a tensor-parallel group: differentiable, synchronous or not, and counted.

The four differentiable ones are two conjugate pairs (Megatron-LM, Shoeybi et al. 2019,
https://arxiv.org/abs/1909.08053, section 3), of which the first are the paper's f and g:

====================  ==================  ==================
function              forward             backward
====================  ==================  ==================
copy_to_region        identity            all-reduce
reduce_from_region    all-reduce          identity
gather_from_region    all-gather          own part
split_to_region       own part            all-gather
====================  ==================  ==================

Each backward calls its partner as an autograd function, so derivatives of any order are right. ``group=None`` means one
rank: every function is then the identity.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from tp_plugin import exit_pause  # noqa: F401


@dataclasses.dataclass
class Record:
    """One collective as issued: its kind, its purpose, and the bytes of this rank's tensor."""

    kind: str
    purpose: str
    nbytes: int
    backward: bool


@dataclasses.dataclass
class Counter:
    """Every collective issued through this module while the counter is open, in order."""

    records: list[Record] = dataclasses.field(default_factory=list)

    def count(self, purpose: str | None = None, *, backward: bool | None = None) -> int:
        """Number of collectives, optionally of one purpose or one direction."""
        return len(self._pick(purpose, backward))

    def nbytes(self, purpose: str | None = None, *, backward: bool | None = None) -> int:
        """Bytes of this rank's tensors, optionally of one purpose or one direction."""
        return sum(record.nbytes for record in self._pick(purpose, backward))

    def _pick(self, purpose: str | None, backward: bool | None) -> list[Record]:
        return [
            r
            for r in self.records
            if (purpose is None or r.purpose == purpose) and (backward is None or r.backward == backward)
        ]


_COUNTERS: list[Counter] = []


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """Count the collectives of this process issued inside the ``with`` block."""
    counter = Counter()
    _COUNTERS.append(counter)
    try:
        yield counter
    finally:
        _COUNTERS.remove(counter)


def _note(kind: str, purpose: str, tensor: torch.Tensor) -> None:
    if _COUNTERS:
        backward = torch._C._current_graph_task_id() != -1
        for counter in _COUNTERS:
            counter.records.append(Record(kind, purpose, tensor.numel() * tensor.element_size(), backward))


def size_of(group: dist.ProcessGroup | None) -> int:
    """Ranks in the group; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def rank_in(group: dist.ProcessGroup | None) -> int:
    """This rank's number in the group; 0 for None."""
    return 0 if group is None else dist.get_rank(group)


def all_reduce_(
    tensor: torch.Tensor,
    group: dist.ProcessGroup | None,
    *,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    purpose: str = "",
    async_op: bool = False,
) -> dist.Work | None:
    """Reduce ``tensor`` in place over the group. Returns the handle to wait on when ``async_op``, else None.

    ``tensor`` must be contiguous: otherwise a copy would be reduced and dropped.
    """
    if group is None:
        return None
    if not tensor.is_contiguous():
        raise ValueError("all_reduce_ needs a contiguous tensor: it reduces in place")
    _note("all_reduce", purpose, tensor)
    return dist.all_reduce(tensor, op=op, group=group, async_op=async_op)


def all_gather(
    tensor: torch.Tensor,
    group: dist.ProcessGroup | None,
    *,
    purpose: str = "",
    sizes: Sequence[int] | None = None,
    dim: int = 0,
) -> list[torch.Tensor]:
    """Every rank's tensor. ``sizes``: each rank's extent along ``dim`` where they differ (then padded on the wire)."""
    if group is None:
        return [tensor]
    tensor, dim = tensor.contiguous(), dim % tensor.dim() if tensor.dim() else 0
    if sizes is None or len(set(sizes)) == 1:
        _note("all_gather", purpose, tensor)
        parts = [torch.empty_like(tensor) for _ in range(size_of(group))]
        dist.all_gather(parts, tensor, group=group)
        return parts
    longest = max(sizes)
    padded = tensor.new_zeros((*tensor.shape[:dim], longest, *tensor.shape[dim + 1 :]))
    padded.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    parts = all_gather(padded, group, purpose=purpose)
    return [part.narrow(dim, 0, n) for part, n in zip(parts, sizes, strict=True)]


def gather_to(
    tensor: torch.Tensor,
    group: dist.ProcessGroup | None,
    to: int,
    received: Sequence[torch.Tensor],
    *,
    purpose: str = "",
) -> None:
    """Send every rank's 1-dim tensor to rank ``to`` of the group, by point-to-point messages.

    Nothing is padded or allocated, and a rank with an empty tensor sends nothing.

    Args:
        received: on rank ``to`` one tensor a rank, of that rank's size, to write to; its own is not written. Ignored
            on the other ranks.
    """
    if group is None:
        return
    _note("gather", purpose, tensor)
    if rank_in(group) == to:
        others = [(other, part) for other, part in enumerate(received) if other != to and part.numel()]
        sends = [dist.P2POp(dist.irecv, part, group=group, group_peer=other) for other, part in others]
    else:
        sends = [dist.P2POp(dist.isend, tensor, group=group, group_peer=to)] if tensor.numel() else []
    for work in dist.batch_isend_irecv(sends) if sends else []:
        work.wait()


def start_all_gather(
    tensor: torch.Tensor, group: dist.ProcessGroup | None, *, purpose: str = ""
) -> Callable[[], torch.Tensor]:
    """Start to gather tensors of one shape, at least 1-dim; the function returned waits and gives ``[ranks, ...]``."""
    if group is None:
        return lambda: tensor.unsqueeze(0)
    tensor = tensor.contiguous()
    _note("all_gather", purpose, tensor)
    out = tensor.new_empty((size_of(group) * tensor.shape[0], *tensor.shape[1:]))
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the older name, till torch 2.12
    work = gather(out, tensor, group=group, async_op=True)

    def wait() -> torch.Tensor:
        work.wait()
        return out.view(size_of(group), *tensor.shape)

    return wait


def broadcast_(tensor: torch.Tensor, group: dist.ProcessGroup | None, *, purpose: str = "") -> None:
    """Overwrite ``tensor``, which must be contiguous, with that of the group's rank 0."""
    if group is None:
        return
    if not tensor.is_contiguous():
        raise ValueError("broadcast_ needs a contiguous tensor: it writes in place")
    _note("broadcast", purpose, tensor)
    dist.broadcast(tensor, group_src=0, group=group)


class _Copy(torch.autograd.Function):
    """forward: identity; backward: all-reduce."""

    @staticmethod
    def forward(ctx, x, group, purpose):
        ctx.group, ctx.purpose = group, purpose
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        return reduce_from_region(grad, ctx.group, purpose=ctx.purpose), None, None


class _Reduce(torch.autograd.Function):
    """forward: all-reduce, in place; backward: identity."""

    @staticmethod
    def forward(ctx, x, group, purpose):
        ctx.group, ctx.purpose = group, purpose
        all_reduce_(x, group, purpose=purpose)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return copy_to_region(grad, ctx.group, purpose=ctx.purpose), None, None


class _Gather(torch.autograd.Function):
    """forward: all-gather; backward: this rank's part."""

    @staticmethod
    def forward(ctx, x, group, dim, sizes, purpose):
        ctx.split = group, dim, sizes
        ctx.purpose = purpose
        return torch.cat(all_gather(x, group, purpose=purpose, sizes=sizes, dim=dim), dim)

    @staticmethod
    def backward(ctx, grad):
        return split_to_region(grad, *ctx.split, purpose=ctx.purpose), None, None, None, None


class _Split(torch.autograd.Function):
    """forward: this rank's part; backward: all-gather."""

    @staticmethod
    def forward(ctx, x, group, dim, sizes, purpose):
        ctx.split = group, dim, sizes
        ctx.purpose = purpose
        rank = rank_in(group)
        return x.narrow(dim, sum(sizes[:rank]), sizes[rank]).contiguous()

    @staticmethod
    def backward(ctx, grad):
        return gather_from_region(grad, *ctx.split, purpose=ctx.purpose), None, None, None, None


def copy_to_region(x: torch.Tensor, group: dist.ProcessGroup | None, *, purpose: str = "enter") -> torch.Tensor:
    """Enter a sharded region; forward: identity, backward: all-reduce of the partial gradients. Any shape."""
    return x if group is None else _Copy.apply(x, group, purpose)


def reduce_from_region(x: torch.Tensor, group: dist.ProcessGroup | None, *, purpose: str = "leave") -> torch.Tensor:
    """Leave a sharded region; forward: all-reduce of the partial outputs, backward: identity. Any shape.

    Reduces in place: ``x`` must be an intermediate result without another reader (a product, a masked lookup).
    """
    return x if group is None else _Reduce.apply(x.contiguous(), group, purpose)


def gather_from_region(
    x: torch.Tensor, group: dist.ProcessGroup | None, dim: int, sizes: Sequence[int], *, purpose: str = "gather"
) -> torch.Tensor:
    """Join the shards for a replicated consumer; forward: all-gather along ``dim``, backward: this rank's part.

    ``sizes`` are all ranks' extents along ``dim``. The incoming gradient must be equal on all ranks.
    """
    return x if group is None else _Gather.apply(x, group, dim % x.dim(), tuple(sizes), purpose)


def split_to_region(
    x: torch.Tensor, group: dist.ProcessGroup | None, dim: int, sizes: Sequence[int], *, purpose: str = "split"
) -> torch.Tensor:
    """Shard a replicated tensor; forward: this rank's part along ``dim``, backward: all-gather of the gradients."""
    return x if group is None else _Split.apply(x, group, dim % x.dim(), tuple(sizes), purpose)
