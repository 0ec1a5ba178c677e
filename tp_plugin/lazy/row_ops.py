"""Views and selections of full rows, which stay lazy: they select the same rows of the hidden states."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tp_plugin.errors import TensorParallelError
from tp_plugin.lazy.dispatch import answers
from tp_plugin.lazy.logits import step
from tp_plugin.lazy.recipe import Family

Selected = tuple[Tensor, Callable[[Tensor], Tensor], bool]


def reshaped(func: Any, shape: Sequence[int], args: tuple, kwargs: dict) -> tuple[int, ...] | None:
    """The shape that ``func``, a row-major view, gives to logits of ``shape``; None if the last dimension changes.

    Errors are torch's own.
    """
    if any(isinstance(x, torch.dtype) for x in (*args, *kwargs.values())):
        return None
    as_meta = [torch.empty(x.shape, device="meta") if isinstance(x, Tensor) else x for x in args]
    made = tuple(func(torch.empty(shape, device="meta"), *as_meta, **kwargs).shape)
    return made if len(made) > 1 and made[-1] == shape[-1] else None


def key_of(full: Tensor, piece: Tensor) -> tuple[int | slice, ...] | None:
    """The index of the view ``piece`` of ``full``, contiguous; the view slices or selects along one dimension.

    None for an empty piece, whose start is unknown.
    """
    if not piece.numel():
        return None
    starts, offset = [], int(piece.storage_offset())
    for stride in full.stride():
        start, offset = divmod(offset, stride)
        starts.append(start)
    if piece.dim() == full.dim():
        bounds = zip(starts, piece.shape, full.shape, strict=True)
        return tuple(slice(None) if size == most else slice(start, start + size) for start, size, most in bounds)
    for dim, start in enumerate(starts):
        kept = [place for place in range(full.dim()) if place != dim]
        if [(full.shape[i], full.stride(i)) for i in kept] == list(zip(piece.shape, piece.stride(), strict=True)):
            return (*[slice(None)] * dim, start)
    return None


def select_rows(hidden: Tensor, key: Any) -> Selected | None:
    """``hidden[key]`` for a ``key`` meant for logits of the same leading dimensions, if it selects full rows.

    Args:
        hidden: [..., H].
        key: any index: numbers, slices, None, Ellipsis, integer or boolean tensors, lists.

    Returns:
        The selected hidden states; the function that maps their gradient to the shape of ``hidden``; and True if torch
        would return a view. None if the key indexes the last dimension.
    """
    parts = _spelled_out(key, hidden.dim())
    if parts is None:
        return None
    shape = hidden.shape
    if all(part is None or isinstance(part, int | slice) for part in parts):

        def put_back(grad: Tensor) -> Tensor:
            out = grad.new_zeros(shape)
            out[parts] = grad
            return out

        return hidden[parts], put_back, True
    ids = torch.arange(shape[:-1].numel(), device=hidden.device).reshape(shape[:-1])[parts[:-1]]
    flat = hidden.reshape(-1, shape[-1])

    def add_back(grad: Tensor) -> Tensor:
        out = grad.new_zeros((shape[:-1].numel(), shape[-1]))
        return out.index_add_(0, ids.reshape(-1), grad.reshape(-1, shape[-1])).reshape(shape)

    return flat[ids], add_back, False


def _spelled_out(key: Any, dims: int) -> tuple | None:
    """``key`` as a tuple with one part a dimension (a mask for several), ending in ``slice(None)``; None if not."""
    parts = list(key) if isinstance(key, tuple) else [key]
    used, dots = 0, None
    for place, part in enumerate(parts):
        if part is Ellipsis:
            if dots is not None:
                return None
            dots = place
        elif isinstance(part, bool) or not (
            part is None or isinstance(part, int | slice | list) or type(part) is Tensor
        ):
            return None
        elif isinstance(part, list):
            parts[place] = part = torch.as_tensor(part)
            if part.dtype not in (torch.int64, torch.bool):
                return None
        if part is not Ellipsis and part is not None:
            mask = isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8)
            if mask and (part.dim() == 0 or part.dtype == torch.uint8):
                return None
            used += part.dim() if mask else 1
    if used > dims:
        return None
    rest = [slice(None)] * (dims - used)
    parts = [*parts, *rest] if dots is None else [*parts[:dots], *rest, *parts[dots + 1 :]]
    last = parts[-1]
    return tuple(parts) if isinstance(last, slice) and last == slice(None) else None


@answers(
    Tensor.view,
    Tensor.reshape,
    torch.reshape,
    Tensor.flatten,
    torch.flatten,
    Tensor.unflatten,
    Tensor.squeeze,
    torch.squeeze,
    Tensor.unsqueeze,
    torch.unsqueeze,
    Tensor.view_as,
    Tensor.reshape_as,
)
def _reshape(func, logits, args, kwargs):
    _refuse_part(logits, args)
    shape = reshaped(func, logits.shape, args, kwargs)
    if shape is None:
        return NotImplemented
    recipe = logits._recipe
    hidden = recipe.hidden.reshape(*shape[:-1], recipe.hidden.shape[-1])
    lead = recipe.hidden.shape
    recipe = dataclasses.replace(recipe, hidden=hidden)
    return step(logits, recipe, shape, logits.dtype, logits._family, lambda grad: grad.reshape(lead))


def _refuse_part(logits: Any, args: Any) -> None:
    """Refuse a flat view with the number of words in ``lm_head.weight.shape``, which is the shard's."""
    sizes = args[0] if len(args) == 1 and isinstance(args[0], tuple | list) else args
    vocab = logits._recipe.vocab
    if len(sizes) == 2 and sizes[0] == -1 and sizes[1] == vocab.rows != logits.shape[-1]:
        raise TensorParallelError(
            "the logits were to be viewed with as many columns as this rank's rows of lm_head.weight; they have all "
            f"{logits.shape[-1]} words: read the number from logits.shape[-1], lm_head.out_features or "
            "config.vocab_size."
        )


@answers(Tensor.__getitem__)
def _getitem(func, logits, args, kwargs):
    return _rows(logits, args[0])


def _rows(logits, key):
    selected = select_rows(logits._recipe.hidden, key)
    if selected is None:
        return NotImplemented
    hidden, pull, is_view = selected
    recipe = dataclasses.replace(logits._recipe, hidden=hidden)
    shape = (*hidden.shape[:-1], logits.shape[-1])
    if len(shape) < 2:  # a single row: nothing to gain
        return NotImplemented
    return step(logits, recipe, shape, logits.dtype, logits._family if is_view else Family(), pull)


@answers(
    torch.split,
    Tensor.split,
    torch.chunk,
    Tensor.chunk,
    torch.tensor_split,
    Tensor.tensor_split,
    torch.unbind,
    Tensor.unbind,
    torch.narrow,
    Tensor.narrow,
    torch.select,
    Tensor.select,
)
def _pieces(func, logits, args, kwargs):
    if any(isinstance(x, Tensor) for x in (*args, *kwargs.values())):
        return NotImplemented
    full = torch.empty(logits.shape, device="meta")
    pieces = Tensor.split(full, *args, **kwargs) if func is torch.split else func(full, *args, **kwargs)
    keys = [key_of(full, piece) for piece in (pieces if isinstance(pieces, tuple | list) else (pieces,))]
    found = [NotImplemented if key is None else _rows(logits, key) for key in keys]
    if any(piece is NotImplemented for piece in found):
        return NotImplemented
    return tuple(found) if isinstance(pieces, tuple | list) else found[0]


@answers(Tensor.__iter__)
def _iterate(func, logits, args, kwargs):
    return iter([_rows(logits, number) for number in range(len(logits))]) if logits.dim() > 2 else NotImplemented
