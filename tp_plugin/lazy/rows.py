"""Row operations: what takes whole rows of logits can as well take rows of the hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Taken = tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor], bool]


def reshaped(func: Any, shape: Sequence[int], args: tuple, kwargs: dict) -> tuple[int, ...] | None:
    """The shape ``func`` (a view in row-major order) gives to logits of ``shape``; None if the last dimension changes.

    Errors are torch's own.
    """
    if any(isinstance(x, torch.dtype) for x in (*args, *kwargs.values())):
        return None
    as_meta = [torch.empty(x.shape, device="meta") if isinstance(x, torch.Tensor) else x for x in args]
    made = tuple(func(torch.empty(shape, device="meta"), *as_meta, **kwargs).shape)
    return made if len(made) > 1 and made[-1] == shape[-1] else None


def key_of(whole: torch.Tensor, piece: torch.Tensor) -> tuple[int | slice, ...] | None:
    """The index with which ``whole``, contiguous, gives its view ``piece``, cut or selected along one dimension.

    None for an empty piece, which begins nowhere.
    """
    if not piece.numel():
        return None
    starts, offset = [], int(piece.storage_offset())
    for stride in whole.stride():
        start, offset = divmod(offset, stride)
        starts.append(start)
    if piece.dim() == whole.dim():
        cuts = zip(starts, piece.shape, whole.shape, strict=True)
        return tuple(slice(None) if size == full else slice(start, start + size) for start, size, full in cuts)
    for dim, start in enumerate(starts):
        kept = [place for place in range(whole.dim()) if place != dim]
        if [(whole.shape[i], whole.stride(i)) for i in kept] == list(zip(piece.shape, piece.stride(), strict=True)):
            return (*[slice(None)] * dim, start)
    return None


def taken(hidden: torch.Tensor, key: Any) -> Taken | None:
    """``hidden[key]`` for a ``key`` meant for logits of the same leading dimensions, if it takes whole rows.

    Args:
        hidden: [..., H].
        key: any index: numbers, slices, None, Ellipsis, integer or boolean tensors, lists.

    Returns:
        The hidden states taken; the function that brings their gradient back to the shape of ``hidden``; and whether
        torch would return a view. None if the key reaches into the last dimension.
    """
    parts = _spelled_out(key, hidden.dim())
    if parts is None:
        return None
    shape = hidden.shape
    if all(part is None or isinstance(part, int | slice) for part in parts):

        def put_back(grad: torch.Tensor) -> torch.Tensor:
            out = grad.new_zeros(shape)
            out[parts] = grad
            return out

        return hidden[parts], put_back, True
    ids = torch.arange(shape[:-1].numel(), device=hidden.device).reshape(shape[:-1])[parts[:-1]]
    flat = hidden.reshape(-1, shape[-1])

    def add_back(grad: torch.Tensor) -> torch.Tensor:
        out = grad.new_zeros((shape[:-1].numel(), shape[-1]))
        return out.index_add_(0, ids.reshape(-1), grad.reshape(-1, shape[-1])).reshape(shape)

    return flat[ids], add_back, False


def _spelled_out(key: Any, dims: int) -> tuple | None:
    """``key`` as a tuple with one part per dimension (a mask for several), ending in ``slice(None)``."""
    parts = list(key) if isinstance(key, tuple) else [key]
    used, dots = 0, None
    for place, part in enumerate(parts):
        if part is Ellipsis:
            if dots is not None:
                return None
            dots = place
        elif isinstance(part, bool) or not (
            part is None or isinstance(part, int | slice | list) or type(part) is torch.Tensor
        ):
            return None
        elif isinstance(part, list):
            parts[place] = part = torch.as_tensor(part)
            if part.dtype not in (torch.int64, torch.bool):
                return None
        if part is not Ellipsis and part is not None:
            mask = isinstance(part, torch.Tensor) and part.dtype in (torch.bool, torch.uint8)
            if mask and (part.dim() == 0 or part.dtype == torch.uint8):
                return None
            used += part.dim() if mask else 1
    if used > dims:
        return None
    whole = [slice(None)] * (dims - used)
    parts = [*parts, *whole] if dots is None else [*parts[:dots], *whole, *parts[dots + 1 :]]
    last = parts[-1]
    return tuple(parts) if isinstance(last, slice) and last == slice(None) else None
