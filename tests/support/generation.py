"""Models, ways to generate, and what they give."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    WatermarkingConfig,
)

import tp_plugin
from tests.support import zoo
from tests.support.models import batch, make
from tp_plugin.config import TensorParallelConfig

TP = 2


def sharded(model: torch.nn.Module) -> Any:
    tp_plugin.shard_model(model, TensorParallelConfig(tp_size=TP, quiet=True))
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: make("Llama"),
    "one key head": lambda: make("Llama", heads=(4, 1)),  # both ranks hold it
    "shared key heads": lambda: make("Qwen2", heads=(6, 3)),  # one of three on both ranks
    "gemma2": lambda: make("Gemma2"),  # every other layer's cache slides
    "gemma3": lambda: make("Gemma3"),
    "mistral": lambda: make("Mistral", sliding_window=6),
    "deepseek": lambda: make("DeepseekV3"),
    "gpt2": lambda: zoo.build("gpt2"),
    "t5": lambda: zoo.build("t5"),
    "bart": lambda: zoo.build("bart"),
}


LENGTH = {"max_new_tokens": 7, "min_new_tokens": 7, "no_repeat_ngram_size": 1, "pad_token_id": 0}


@dataclasses.dataclass(frozen=True)
class Way:
    """``single``: takes one prompt at a time. ``kinds``: the models it is run on; None are all."""

    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    single: bool = False
    kinds: tuple[str, ...] | None = None


DECODERS = ("llama", "shared key heads", "gemma2", "mistral")


WAYS: dict[str, Way] = {
    "greedy": Way(),
    "sampled": Way({"do_sample": True, "top_k": 20, "top_p": 0.95, "temperature": 0.9}),
    "several": Way({"do_sample": True, "num_return_sequences": 2}),
    "beams": Way({"num_beams": 3}),
    "sampled beams": Way({"do_sample": True, "num_beams": 2}),
    "static cache": Way({"cache_implementation": "static"}),
    "beams, static cache": Way({"cache_implementation": "static", "num_beams": 2}),
    "no cache": Way({"use_cache": False}),
    "prefill in chunks": Way({"prefill_chunk_size": 4}, kinds=DECODERS),
    "guided": Way({"guidance_scale": 1.5}, kinds=DECODERS),
    "watermarked": Way({"watermarking_config": WatermarkingConfig(), "do_sample": True}, kinds=DECODERS),
    "looked up in the prompt": Way({"prompt_lookup_num_tokens": 2}, single=True, kinds=DECODERS),
    "assisted": Way({"assistant": True}, single=True, kinds=DECODERS),
}


def tokens_of(model: Any, way: Way, padded: bool) -> torch.Tensor:
    ids = batch(0, 3)["input_ids"]
    mask = torch.ones_like(ids)
    if padded:
        for row, count in enumerate((3, 5)):
            ids[row, :count] = mask[row, :count] = 0
    if way.single:
        ids, mask = ids[:1], mask[:1]
    options = dict(way.options)
    if options.pop("assistant", False):
        options["assistant_model"] = make("Llama", seed=3).eval()
    torch.manual_seed(5)
    return model.generate(input_ids=ids, attention_mask=mask, **LENGTH | options)


RUN = [(kind, name) for kind in MODELS for name, way in WAYS.items() if way.kinds is None or kind in way.kinds]


def prompts(rows: int = 2, step: int = 0) -> dict[str, torch.Tensor]:
    ids = batch(step, rows)["input_ids"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
