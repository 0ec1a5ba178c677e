"""A small model to check: built reproducibly, its inputs, and its modules' outputs."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from tp_plugin.layers.generators import same_draws, seed_all
from tp_plugin.lazy import VocabParallelLogits
from tp_plugin.model_check.resolve_model import configs_in

ROWS, LENGTH = 2, 12
NOISE = 0.05
MOST_PATCHES = 1024
"""Patches of one picture; models with more of them get no picture."""
_IMAGE_TOKEN = ("image_token_id", "image_token_index", "media_placeholder_token_id")
Recorded = TypeVar("Recorded")


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """A model that every call of :meth:`build` makes bit-identical, leaving the random state as it is.

    Attributes:
        model_class: called with ``config``.
        config: a shrunk config, or the class's own kind.
        variant: index of its inputs among :func:`input_candidates`.
        dtype: of its parameters and floating-point inputs.
    """

    model_class: type[nn.Module]
    config: Any
    variant: int = 0
    dtype: torch.dtype = torch.float32

    def build(self) -> nn.Module:
        """Build it on the CPU in training mode; noise replaces values that hide bugs (zero biases, unit norms)."""
        with same_draws(torch.device("cpu")), torch.device("cpu"):
            seed_all(0)
            model = self.model_class(self.config).to(self.dtype)
            with torch.no_grad():
                for index, param in enumerate(model.parameters()):
                    noise = torch.randn(param.shape, generator=torch.Generator().manual_seed(index))
                    param.add_((NOISE * noise).to(self.dtype))
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
        return model.train()

    def inputs(self, model: nn.Module) -> dict[str, Any]:
        """Keyword arguments of ``model.forward``, with labels."""
        for index, found in enumerate(input_candidates(model)):
            if index == self.variant:
                return {
                    name: value.to(self.dtype)
                    if isinstance(value, torch.Tensor) and value.is_floating_point()
                    else value
                    for name, value in found.items()
                }
        raise IndexError(f"no variant {self.variant}")


def input_candidates(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield inputs that a model may take, the most complete first; callers use the first that runs unsharded."""
    takes = inspect.signature(model.forward).parameters
    base = _audio(model, takes) or _text(model, takes)
    with contextlib.suppress(Exception):  # a model with remote code may take pictures in another form
        if (seeing := with_pictures(model, base)) is not None:
            yield seeing
    yield base
    shape = base["input_ids"].shape if "input_ids" in base else (ROWS, LENGTH)
    zeros = torch.zeros(shape, dtype=torch.long)
    extra = {name: zeros for name in ("token_type_ids", "mm_token_type_ids") if name in takes}
    if extra:
        yield base | extra
    if "bbox" in takes:
        yield base | {"bbox": torch.arange(4).expand(*shape, 4) * 5}
    if "use_cache" in takes:
        yield base | {"use_cache": False}
    books = vars(model.config).get("num_codebooks")
    if books and "input_ids" in base:
        yield base | {
            "input_ids": base["input_ids"].repeat(books, 1),
            "labels": base["input_ids"][..., None].repeat(1, 1, books),
        }
    if "decoder_input_ids" in takes and "decoder_input_ids" not in base:
        yield base | {"decoder_input_ids": base.get("labels", zeros).clamp_min(1)}


def _text(model: nn.Module, takes: Any) -> dict[str, Any]:
    random = torch.Generator().manual_seed(7)
    ids = _ids(model, random)
    found: dict[str, Any] = {"input_ids": ids}
    config: Any = model.config
    eos = config.eos_token_id if isinstance(getattr(config, "eos_token_id", None), int) else None
    if "labels" not in takes:
        return found
    if type(model).__name__.endswith("SequenceClassification"):
        if config.is_encoder_decoder and eos is not None:
            ids[:, -1] = eos
        return found | {"labels": torch.arange(ROWS) % max(config.num_labels, 1)}
    labels = ids.clone()
    if getattr(config, "is_encoder_decoder", False):
        labels = _ids(model, random, length=LENGTH - 3)
    for row in range(ROWS):
        labels[row, : 1 + 2 * row] = -100
    return found | {"labels": labels}


def _ids(model: nn.Module, random: torch.Generator, length: int = LENGTH) -> torch.Tensor:
    special = set()
    sizes = []
    for part in configs_in(model.config):
        for name, value in vars(part).items():
            if "token" in name or name.endswith(("_id", "_idx", "_index")):
                special |= {v for v in (value if isinstance(value, list) else [value]) if type(v) is int}
            if name in ("vocab_size", "src_vocab_size", "tgt_vocab_size", "decoder_vocab_size") and type(value) is int:
                sizes.append(value)
    plain = [i for i in range(1, min([s for s in sizes if s > 1], default=128)) if i not in special]
    return torch.tensor(plain)[torch.randint(len(plain), (ROWS, length), generator=random)]


def _audio(model: nn.Module, takes: Any) -> dict[str, Any] | None:
    """Sound for speech models: spectrograms as wide as the config says, or a raw wave."""
    config: Any = model.config
    main = getattr(model, "main_input_name", "input_ids")
    if main not in ("input_features", "input_values") or not config.is_encoder_decoder:
        return None
    random = torch.Generator().manual_seed(7)
    parts = list(configs_in(config))
    found: dict[str, Any] = {"labels": _ids(model, random)} if "labels" in takes else {}
    if main == "input_values":
        return found | {"input_values": torch.randn(ROWS, 4000, generator=random)}
    names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "mel_dim")
    bins = next((v for part in parts for name in names if (v := vars(part).get(name))), 80)
    if config.model_type == "whisper":
        return found | {"input_features": torch.randn(ROWS, bins, 2 * config.max_source_positions, generator=random)}
    return found | {"input_features": torch.randn(ROWS, 48, bins, generator=random)}


@contextlib.contextmanager
def recorded_outputs(
    model: nn.Module, record: Callable[[torch.Tensor], Recorded], wanted: Callable[[str], bool] = lambda _: True
) -> Iterator[dict[str, Recorded]]:
    """Fill the yielded dict while open: module name -> ``record`` of the first output tensor of its first call.

    Names are in the order in which the modules finish.
    """
    found: dict[str, Recorded] = {}
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():

            def note(_module: nn.Module, _args: Any, output: Any, name: str = name) -> None:
                outputs = output if isinstance(output, tuple | list) else [output]
                tensor = next((one for one in outputs if isinstance(one, torch.Tensor)), None)
                if tensor is None or isinstance(tensor, VocabParallelLogits) or not tensor.is_floating_point():
                    return
                if name not in found:
                    found[name] = record(tensor)

            if wanted(name):
                stack.callback(module.register_forward_hook(note).remove)
        yield found


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
    token = next((v for part in parts for name in _IMAGE_TOKEN if type(v := vars(part).get(name)) is int), None)
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
    """Images as patches, as Qwen2-VL takes them: ``[patches, channels * time * patch * patch]`` and their grids."""
    fields = vars(vision)
    merge = fields.get("spatial_merge_size") or fields.get("merge_size") or 2
    side = 2 * merge if isinstance(merge, int) else 4
    channels = fields.get("in_channels") or fields.get("num_channels") or 3
    width = channels * (fields.get("temporal_patch_size") or 1) * fields["patch_size"] ** 2
    pixels = torch.randn(rows * side * side, width, generator=torch.Generator().manual_seed(5))
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, side, side]] * rows)}


@torch.no_grad()
def _tokens_of(model: nn.Module, pictures: dict[str, torch.Tensor]) -> int:
    """Count the embeddings that the model makes of all pictures; 0 if it cannot tell."""
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
