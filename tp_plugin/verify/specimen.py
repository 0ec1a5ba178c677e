"""A small model to examine: which class, built how, fed what."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tp_plugin.errors import TensorParallelError
from tp_plugin.verify.images import with_pictures
from tp_plugin.verify.scale import configs_in

ROWS, LENGTH = 2, 12
NOISE = 0.05
HEADS = {
    "seq2seq LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "masked LM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "causal LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "sequence classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "vision-language": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "speech seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
}
"""Kinds of heads, the most telling first, and the table of transformers that lists their classes."""


def architectures() -> dict[str, tuple[str, str]]:
    """Every model type of the installed transformers that has a head of :data:`HEADS` -> (kind, class name)."""
    from transformers.models.auto import modeling_auto

    found: dict[str, tuple[str, str]] = {}
    for kind, table in HEADS.items():
        for model_type, name in getattr(modeling_auto, table).items():
            found.setdefault(model_type, (kind, name if isinstance(name, str) else name[0]))
    return dict(sorted(found.items()))


def class_named(name: str) -> type[nn.Module]:
    """A model class of transformers by its name."""
    import transformers

    return getattr(transformers, name)


def class_for(config: Any) -> type[nn.Module]:
    """The model class for a config: the one its checkpoint names, else the best head of its model type.

    Raises:
        TensorParallelError: transformers has no model with a loss for it.
    """
    import transformers

    for name in config.architectures or ():
        if isinstance(found := getattr(transformers, name, None), type):
            return found
    known = architectures()
    if config.model_type not in known:
        raise TensorParallelError(
            f"transformers has no language-model or classification head for model type {config.model_type!r}; name the "
            "class in 'architectures' of the config."
        )
    return class_named(known[config.model_type][1])


def config_for(model_class: type[nn.Module], config: Any) -> Any:
    """``config``, or the part of it that ``model_class`` takes (the text model of a vision-language config)."""
    wanted = getattr(model_class, "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    return next((part for part in configs_in(config) if type(part) is wanted), config)


@dataclasses.dataclass(frozen=True)
class Specimen:
    """A model that can be built again and again, the same to the bit, without touching the random state around it.

    Attributes:
        model_class: called with ``config``.
        config: a scaled config, or whatever the class takes.
        variant: which of :func:`candidates` the model is fed.
        dtype: of its parameters and floating-point inputs.
    """

    model_class: type[nn.Module]
    config: Any
    variant: int = 0
    dtype: torch.dtype = torch.float32

    def build(self) -> nn.Module:
        """On the CPU, training, no parameter left at a value that hides bugs (zero biases, unit norms)."""
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
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
        for index, found in enumerate(candidates(model)):
            if index == self.variant:
                return {
                    name: value.to(self.dtype)
                    if isinstance(value, torch.Tensor) and value.is_floating_point()
                    else value
                    for name, value in found.items()
                }
        raise IndexError(f"no variant {self.variant}")


def candidates(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Inputs a model may want, the most telling first; the first that runs unsharded is the one used."""
    takes = inspect.signature(model.forward).parameters
    base = _audio(model, takes) or _text(model, takes)
    with contextlib.suppress(Exception):  # somebody else's model may want its pictures otherwise
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
    if config.is_encoder_decoder:
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
    if model.main_input_name not in ("input_features", "input_values") or not config.is_encoder_decoder:
        return None
    random = torch.Generator().manual_seed(7)
    parts = list(configs_in(config))
    found: dict[str, Any] = {"labels": _ids(model, random)} if "labels" in takes else {}
    if model.main_input_name == "input_values":
        return found | {"input_values": torch.randn(ROWS, 4000, generator=random)}
    names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "mel_dim")
    bins = next((v for part in parts for name in names if (v := vars(part).get(name))), 80)
    if config.model_type == "whisper":
        return found | {"input_features": torch.randn(ROWS, bins, 2 * config.max_source_positions, generator=random)}
    return found | {"input_features": torch.randn(ROWS, 48, bins, generator=random)}
