"""Inputs with a picture in each row, for models that see: the vision tower is then part of what is compared."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from torch import nn

from tp_plugin.verify.scale import configs_in

MOST_PATCHES = 1024
"""Of one picture; towers made for more get none."""
_TOKEN = ("image_token_id", "image_token_index", "media_placeholder_token_id")


def with_pictures(model: nn.Module, base: dict[str, Any]) -> dict[str, Any] | None:
    """``base`` with pictures as the model takes them, and as many image tokens as it makes of them.

    Args:
        base: ``input_ids`` and ``labels``, both ``[rows, length]``.

    Returns:
        None if the model sees no pictures or they cannot be made.
    """
    takes = inspect.signature(model.forward).parameters
    parts = list(configs_in(model.config))
    vision = next((part for part in parts if "patch_size" in vars(part)), None)
    if "pixel_values" not in takes or vision is None or "input_ids" not in base:
        return None
    rows = len(base["input_ids"])
    if "image_grid_thw" in takes:
        return _seen(model, base, takes, parts, _patches(vision, rows))
    square = _pixels(vision, rows)
    if square is None:
        return None
    pixels = square["pixel_values"]
    sized = square | {"image_sizes": torch.tensor([pixels.shape[-2:]] * rows)}
    several = {"pixel_values": pixels[:, None]}  # several pictures a row, here one
    for pictures in (square, *([sized] if "image_sizes" in takes else []), several):
        with contextlib.suppress(Exception):  # it wants them in another of these ways
            return _seen(model, base, takes, parts, pictures)
    return None


def _seen(
    model: nn.Module, base: dict[str, Any], takes: Any, parts: list[Any], pictures: dict[str, torch.Tensor]
) -> dict[str, Any]:
    rows = len(base["input_ids"])
    count = _tokens_of(model, pictures) // rows
    token = next((v for part in parts for name in _TOKEN if type(v := vars(part).get(name)) is int), None)
    if not count or token is None:
        return base | pictures  # the model puts them in itself
    start = next((v for part in parts if type(v := vars(part).get("vision_start_token_id")) is int), None)
    return _spliced(model, base, takes, token, [start] * (start is not None), count) | pictures


def _spliced(
    model: nn.Module, base: dict[str, Any], takes: Any, token: int, before: list[int | None], count: int
) -> dict[str, Any]:
    ids = base["input_ids"]
    block = torch.tensor([*before, *[token] * count]).repeat(len(ids), 1)
    ids = torch.cat([ids[:, :1], block, ids[:, 1:]], 1)
    found: dict[str, Any] = {"input_ids": ids}
    if "labels" in base:
        ignored = torch.full_like(block, -100)
        found["labels"] = torch.cat([base["labels"][:, :1], ignored, base["labels"][:, 1:]], 1)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in takes:
            found[name] = (ids == token).long()
    return base | found


def _pixels(vision: Any, rows: int) -> dict[str, torch.Tensor] | None:
    """Square images, ``[rows, channels, size, size]``."""
    fields = vars(vision)
    size, patch = fields.get("image_size"), fields["patch_size"]
    size, patch = (s[0] if isinstance(s, list | tuple) else s for s in (size, patch))
    if not isinstance(size, int) or not isinstance(patch, int) or (size // patch) ** 2 > MOST_PATCHES:
        return None
    channels = fields.get("num_channels") or fields.get("in_channels") or 3
    return {"pixel_values": torch.randn(rows, channels, size, size, generator=torch.Generator().manual_seed(5))}


def _patches(vision: Any, rows: int) -> dict[str, torch.Tensor]:
    """Images cut already, as Qwen2-VL takes them: ``[patches, channels * time * patch * patch]`` and their grids."""
    fields = vars(vision)
    merge = fields.get("spatial_merge_size") or fields.get("merge_size") or 2
    side = 2 * merge if isinstance(merge, int) else 4
    channels = fields.get("in_channels") or fields.get("num_channels") or 3
    width = channels * (fields.get("temporal_patch_size") or 1) * fields["patch_size"] ** 2
    pixels = torch.randn(rows * side * side, width, generator=torch.Generator().manual_seed(5))
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, side, side]] * rows)}


@torch.no_grad()
def _tokens_of(model: nn.Module, pictures: dict[str, torch.Tensor]) -> int:
    """How many embeddings the model makes of all pictures; 0 if it does not say."""
    ask: Any = getattr(model, "get_image_features", None) or getattr(
        getattr(model, "model", None), "get_image_features", None
    )
    if ask is None:
        return 0
    takes = inspect.signature(ask).parameters
    found = ask(**{name: value for name, value in pictures.items() if name in takes})
    found = getattr(found, "pooler_output", found)
    tensors = [found] if isinstance(found, torch.Tensor) else [t for t in found if isinstance(t, torch.Tensor)]
    return sum(t.numel() // t.shape[-1] for t in tensors)
