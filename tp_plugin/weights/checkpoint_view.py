"""Tensors that have not been read: transformers renames, joins and casts them, and a rank reads only its shards.

An :class:`Unread` has a shape, a dtype and a source of its elements. Slicing, transposing, joining and casting one give
another. So transformers' own conversions run on them unchanged: per-expert matrices stacked into one parameter, a
packed projection split in three. Any other operation is deferred: its operands are read completely when a part of its
result is read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map

from tp_plugin.collectives import broadcast_
from tp_plugin.errors import agree, sentence_of
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh, comm_device
from tp_plugin.sharding.adapters import shard_param_
from tp_plugin.weights.reader import Index
from tp_plugin.weights.sources import Cast, Computed, Joined, Made, Part, Source, Squeezed, Transposed, Unsqueezed

aten = torch.ops.aten


class Unread(torch.Tensor):
    """A tensor whose elements are read by :meth:`read_into` and :meth:`read` only."""

    source: Source

    @staticmethod
    def __new__(cls, source: Source) -> Unread:
        made = torch.Tensor._make_wrapper_subclass(cls, source.shape, dtype=source.dtype, device=torch.device("cpu"))
        made.source = source
        return made

    def __init__(self, source: Source) -> None: ...

    def read(self) -> torch.Tensor:
        """Read all elements."""
        return self.source.whole()

    def read_into(self, out: torch.Tensor, index: Index) -> None:
        """Read the part at ``index`` (start and stop for each dimension), cast to the dtype of ``out``."""
        self.source.read_into(out, index)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Unread(shape={list(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        known = _VIEWS.get(func)
        if known is not None:
            found = known(*args, **kwargs)
            if found is not None:
                return tree_map(lambda one: Unread(one) if isinstance(one, Source) else one, found)
        return _defer(func, args, kwargs)


def _defer(func: Any, args: tuple, kwargs: dict) -> Any:
    """Outputs of ``func`` with shapes from meta tensors, and elements from operands that are read later."""
    if func is aten.equal.default and args[0] is args[1]:
        return True

    def empty(one: Any) -> Any:
        if not isinstance(one, torch.Tensor):
            return one
        return torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="meta")

    def read(one: Any) -> Any:
        return one.read() if isinstance(one, Unread) else one

    def compute() -> Any:
        return func(*tree_map(read, args), **tree_map(read, kwargs))

    if func._schema.is_mutable:
        raise NotImplementedError(f"{func} would change a tensor that has not been read")
    shaped = func(*tree_map(empty, args), **tree_map(empty, kwargs))
    if isinstance(shaped, torch.Tensor):
        return Unread(Computed(tuple(shaped.shape), shaped.dtype, compute, None))
    if isinstance(shaped, list | tuple) and all(isinstance(one, torch.Tensor) for one in shaped):
        return [Unread(Computed(tuple(one.shape), one.dtype, compute, item)) for item, one in enumerate(shaped)]
    return compute()  # a number


def _source(tensor: torch.Tensor) -> Source:
    if isinstance(tensor, Unread):
        return tensor.source
    return Made(tuple(tensor.shape), tensor.dtype, tensor)


def _same(tensor: torch.Tensor, **_: Any) -> Source:
    return _source(tensor)


def _to(tensor: torch.Tensor, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Source | None:
    source = _source(tensor)
    if device is not None and torch.device(device).type != "cpu":
        return None
    return source if dtype in (None, source.dtype) else Cast(source.shape, dtype, source)


def _narrow(source: Source, dim: int, start: int, stop: int) -> Source:
    shape = (*source.shape[:dim], stop - start, *source.shape[dim + 1 :])
    return source if shape == source.shape else Part(shape, source.dtype, source, dim, start)


def _slice(
    tensor: torch.Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Source | None:
    if step != 1:
        return None
    first, last, _ = slice(start, end).indices(tensor.shape[dim])
    return _narrow(_source(tensor), dim % tensor.dim(), first, max(first, last))


def _squeezed(source: Source, dim: int) -> Source:
    return Squeezed((*source.shape[:dim], *source.shape[dim + 1 :]), source.dtype, source, dim)


def _unsqueezed(source: Source, dim: int) -> Source:
    return Unsqueezed((*source.shape[:dim], 1, *source.shape[dim:]), source.dtype, source, dim)


def _select(tensor: torch.Tensor, dim: int, index: int) -> Source:
    dim %= tensor.dim()
    entry = index % tensor.shape[dim]
    return _squeezed(_narrow(_source(tensor), dim, entry, entry + 1), dim)


def _unbind(tensor: torch.Tensor, dim: int = 0) -> list[Source]:
    return [_select(tensor, dim, entry) for entry in range(tensor.shape[dim])]


def _split(tensor: torch.Tensor, size: int | Sequence[int], dim: int = 0) -> list[Source]:
    total = tensor.shape[dim]
    sizes = [min(size, total - start) for start in range(0, total, size)] if isinstance(size, int) else list(size)
    out, start = [], 0
    for one in sizes:
        out.append(_narrow(_source(tensor), dim % tensor.dim(), start, start + one))
        start += one
    return out


def _transpose(tensor: torch.Tensor, first: int, second: int) -> Source:
    source, first, second = _source(tensor), first % tensor.dim(), second % tensor.dim()
    shape = list(source.shape)
    shape[first], shape[second] = shape[second], shape[first]
    return Transposed(tuple(shape), source.dtype, source, first, second)


def _squeeze(tensor: torch.Tensor, dim: int) -> Source:
    dim %= tensor.dim()
    return _squeezed(_source(tensor), dim) if tensor.shape[dim] == 1 else _source(tensor)


def _unsqueeze(tensor: torch.Tensor, dim: int) -> Source:
    return _unsqueezed(_source(tensor), dim % (tensor.dim() + 1))


def _cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> Source | None:
    parts = tuple(map(_source, tensors))
    if len({part.dtype for part in parts}) > 1 or len({len(part.shape) for part in parts}) > 1:
        return None
    dim %= len(parts[0].shape)
    if len({(*part.shape[:dim], *part.shape[dim + 1 :]) for part in parts}) > 1:
        raise ValueError(f"tensors of shapes {[list(part.shape) for part in parts]} cannot be joined along {dim}")
    return _joined(parts, dim)


def _stack(tensors: Sequence[torch.Tensor], dim: int = 0) -> Source:
    parts = tuple(map(_source, tensors))
    if len({(part.shape, part.dtype) for part in parts}) > 1:
        raise ValueError(f"tensors of shapes {sorted({part.shape for part in parts})} cannot be stacked")
    dim %= len(parts[0].shape) + 1
    return _joined(tuple(_unsqueezed(part, dim) for part in parts), dim)


def _joined(parts: tuple[Source, ...], dim: int) -> Source:
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return Joined(tuple(shape), parts[0].dtype, parts, dim)


_VIEWS: dict[Any, Callable[..., Any]] = {
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.clone.default: _same,
    aten._to_copy.default: _to,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.transpose.int: _transpose,
    aten.squeeze.dim: _squeeze,
    aten.unsqueeze.default: _unsqueeze,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
}


# ---- a rank's shards of unread parameters ----------------------------------------------------------------------------


def unread_names(model: nn.Module) -> list[str]:
    """Names of the unread parameters and buffers, under all their names."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [name for name, tensor in tensors if isinstance(tensor, Unread)]


@torch.no_grad()
def read_shards(model: nn.Module, layouts: Mapping[str, ShardLayout], mesh: ParallelMesh) -> None:
    """Replace every :class:`Unread` parameter and buffer by this rank's shard on the CPU; tied ones are read once.

    Tensors are read one at a time. Beyond the shards, memory holds a window of the file, or the operands of a
    deferred operation.

    Args:
        layouts: by parameter name; a tensor without one is replicated.

    Raises:
        TensorParallelError: on this rank alone, if a file cannot be read.
    """
    read: dict[int, torch.Tensor] = {}
    kept = []  # keeps ids unique while they are keys
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
    out.__dict__.update(notes)  # transformers marks tensors that need no initialisation
    return out


@torch.no_grad()
def share_new(model: nn.Module, names: Collection[str], layouts: Mapping[str, ShardLayout], mesh: ParallelMesh) -> None:
    """Broadcast rank 0's tensors of these names, which no checkpoint has, then shard them. A collective call.

    Differently seeded ranks would otherwise have different tensors.

    Raises:
        TensorParallelError: on every rank, if one has no memory for a tensor.
    """
    tensors = dict(model.named_parameters())
    for name in [name for name in tensors if name in names]:
        if dist.is_initialized() and dist.get_world_size() > 1:
            sent, error = tensors[name].data, None
            try:
                sent = sent.to(comm_device(dist.group.WORLD)).contiguous()
            except Exception as failure:  # out of memory: the other ranks must not wait in the broadcast
                error = f"bringing {name!r}, which the checkpoint lacks, to all ranks failed: {sentence_of(failure)}"
            agree(error)
            broadcast_(sent, dist.group.WORLD, purpose="new parameters")
            tensors[name].data.copy_(sent)
        if name in layouts:
            shard_param_(tensors[name], layouts[name], mesh)
