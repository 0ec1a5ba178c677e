"""Attention functions of a user's own: those that know nothing of heads, and those that count them."""

from __future__ import annotations

import torch
from transformers import AttentionInterface

import tp_plugin
from tests.integrations.transformers.stateful import of, told

HISTORY: list = []


def _distances(query, key):
    places = torch.arange(query.shape[2])
    return -(places[:, None] - places[None, : key.shape[2]]).abs().to(query.dtype)


def _attend(module, query, key, value, mask, bias, scaling, softcap=None):
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).mT * scaling
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    scores = (scores + bias).masked_fill(~causal, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), None


def distance_bias(module, query, key, value, attention_mask, scaling, **_):
    return _attend(module, query, key, value, attention_mask, 2.0 * _distances(query, key), scaling)


def soft_cap(module, query, key, value, attention_mask, scaling, **_):
    return _attend(module, query, key, value, attention_mask, 0.0, scaling, softcap=0.1)


def _slopes(count):
    return torch.tensor([2.0 ** -(3 * (head + 1) / count) * 8 for head in range(count)])


def counts_heads(module, query, key, value, attention_mask, scaling, **_):
    bias = _slopes(query.shape[1])[:, None, None] * _distances(query, key)
    return _attend(module, query, key, value, attention_mask, bias, scaling)


def asks_for_heads(module, query, key, value, attention_mask, scaling, **_):
    heads = tp_plugin.attention_heads(module, query.shape[1])
    slopes = _slopes(heads.total)[list(heads.numbers)].to(query.dtype)
    bias = slopes[:, None, None] * _distances(query, key)
    HISTORY.append(heads)
    return _attend(module, query, key, value, attention_mask, bias, scaling)


def attending(function, half=False):
    """As :func:`told`, or what refused it."""
    AttentionInterface.register(function.__name__, function)
    HISTORY.clear()

    def prepare(trainer):
        trainer.model.set_attn_implementation(function.__name__)

    options = {"attention": function.__name__} if half else {"prepare": prepare}
    try:
        found = of(lambda trainer, model, inputs: model(**inputs).loss, **options)
        return told(found, heads=list(HISTORY), chosen=found[2].model.config._attn_implementation)
    except tp_plugin.TensorParallelError as refused:
        return str(refused)
    finally:
        AttentionInterface._global_mapping.pop(function.__name__, None)


def attention_distance():
    return attending(distance_bias)


def attention_distance_bf16():
    return attending(distance_bias, half=True)


def attention_soft_cap():
    return attending(soft_cap)


def attention_asks():
    return attending(asks_for_heads)


def attention_counts():
    return attending(counts_heads)


ATTENTION = ["attention_distance", "attention_distance_bf16", "attention_soft_cap", "attention_asks"]
