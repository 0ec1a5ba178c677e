"""Sizes and options of the configs that families are drawn with."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

from tests.support import moe

LONGEST = 64  # positions of models that learn them


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Widths and counts of one model. ``hidden`` is free of the heads where a family has a ``head_dim`` of its own."""

    heads: int
    kv: int
    dim: int
    hidden: int
    inner: int
    layers: int
    vocab: int

    @property
    def width(self) -> int:
        return self.heads * self.dim


def sizes(draw: random.Random, tp: int) -> Sizes:
    """Heads that ``tp`` divides in nine cases of ten; everything else as it comes."""
    heads = tp * draw.choice((1, 2, 2, 3)) if draw.random() < 0.9 else draw.randint(1, 8)
    return Sizes(
        heads=heads,
        kv=draw.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        dim=draw.choice((4, 8, 8, 12) if heads <= 8 else (4, 8)),
        hidden=heads * -(-draw.choice((24, 32, 40, 52)) // heads),  # several families want a multiple of the heads
        inner=draw.randint(17, 90),
        layers=draw.choice((1, 2, 2, 3)),
        vocab=draw.randint(37, 211),
    )


def llama(s: Sizes, _draw: random.Random) -> dict[str, Any]:
    """What Llama and its descendants call their sizes."""
    return {
        "hidden_size": s.hidden, "intermediate_size": s.inner, "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads, "num_key_value_heads": s.kv, "head_dim": s.dim,
        "max_position_embeddings": LONGEST,
    }  # fmt: skip


def narrow(s: Sizes, draw: random.Random) -> dict[str, Any]:
    """As :func:`llama`, without a ``head_dim``: the heads make up the hidden size."""
    return {k: v for k, v in llama(s, draw).items() if k != "head_dim"} | {"hidden_size": s.width}


def divided(s: Sizes, draw: random.Random) -> dict[str, Any]:
    """As :func:`narrow`, where the config has a ``head_dim`` that must agree."""
    return llama(s, draw) | {"hidden_size": s.width}


def gemma(s: Sizes, draw: random.Random) -> dict[str, Any]:
    return llama(s, draw) | {
        "sliding_window": draw.choice((4, 16)), "query_pre_attn_scalar": s.dim,
        "final_logit_softcapping": draw.choice((None, 5.0)),
    }  # fmt: skip


def granite(s: Sizes, draw: random.Random) -> dict[str, Any]:
    return narrow(s, draw) | {
        "logits_scaling": draw.choice((1.0, 3.0)), "embedding_multiplier": draw.choice((1.0, 2.0)),
        "attention_multiplier": 0.3, "residual_multiplier": draw.choice((1.0, 0.7)),
    }  # fmt: skip


def windowed(s: Sizes, draw: random.Random) -> dict[str, Any]:
    return llama(s, draw) | {"sliding_window": draw.choice((None, 4, 16))}


def narrow_windowed(s: Sizes, draw: random.Random) -> dict[str, Any]:
    return narrow(s, draw) | {"sliding_window": draw.choice((None, 4, 16))}


def half_rotary(s: Sizes, draw: random.Random) -> dict[str, Any]:
    return narrow(s, draw) | {"partial_rotary_factor": draw.choice((0.5, 1.0))}


def cohere(s: Sizes, draw: random.Random) -> dict[str, Any]:
    return narrow(s, draw) | {"logit_scale": draw.choice((0.0625, 3.0))}


def gpt2(s: Sizes, draw: random.Random) -> dict[str, Any]:
    return {
        "n_embd": s.width, "n_head": s.heads, "n_layer": s.layers, "n_positions": LONGEST, "n_inner": s.inner,
        "activation_function": draw.choice(("gelu_new", "relu")), "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }  # fmt: skip


def gptj(s: Sizes, draw: random.Random) -> dict[str, Any]:
    return gpt2(s, draw) | {"rotary_dim": 4}


def neox(s: Sizes, _draw: random.Random) -> dict[str, Any]:
    return {
        "hidden_size": s.width, "num_attention_heads": s.heads, "num_hidden_layers": s.layers,
        "intermediate_size": s.inner, "max_position_embeddings": LONGEST,
    }  # fmt: skip


def opt(s: Sizes, draw: random.Random) -> dict[str, Any]:
    return {
        "hidden_size": s.width, "num_attention_heads": s.heads, "num_hidden_layers": s.layers, "ffn_dim": s.inner,
        "max_position_embeddings": LONGEST, "dropout": 0.0, "layerdrop": 0.0,
        "word_embed_proj_dim": draw.choice((s.width, 16)),
    }  # fmt: skip


def bloom(s: Sizes, _draw: random.Random) -> dict[str, Any]:
    return {
        "hidden_size": s.width, "n_head": s.heads, "n_layer": s.layers, "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }  # fmt: skip


def falcon(s: Sizes, draw: random.Random) -> dict[str, Any]:
    base = {
        "hidden_size": s.width, "num_attention_heads": s.heads, "num_hidden_layers": s.layers, "hidden_dropout": 0.0,
        "attention_dropout": 0.0, "ffn_hidden_size": s.inner, "bias": draw.random() < 0.5,
    }  # fmt: skip
    kind = draw.choice(("7b", "new", "rw"))
    if kind == "new":
        return base | {"new_decoder_architecture": True, "num_kv_heads": s.kv}
    if kind == "7b":
        return base | {"multi_query": True, "parallel_attn": draw.random() < 0.5}
    return base | {"multi_query": False, "alibi": True, "parallel_attn": False}


def mpt(s: Sizes, draw: random.Random) -> dict[str, Any]:
    return {
        "d_model": s.width, "n_heads": s.heads, "n_layers": s.layers, "max_seq_len": LONGEST,
        "expansion_ratio": draw.choice((2, 4)),
    }  # fmt: skip


def bert(s: Sizes, draw: random.Random) -> dict[str, Any]:
    return {
        "hidden_size": s.width, "num_attention_heads": s.heads, "num_hidden_layers": s.layers,
        "intermediate_size": s.inner, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": LONGEST, "hidden_act": draw.choice(("gelu", "relu")),
    }  # fmt: skip


def bert_causal(s: Sizes, draw: random.Random) -> dict[str, Any]:
    return bert(s, draw) | {"is_decoder": True}


def modernbert(s: Sizes, _draw: random.Random) -> dict[str, Any]:
    return {
        "hidden_size": s.width, "num_attention_heads": s.heads, "num_hidden_layers": s.layers,
        "intermediate_size": s.inner, "local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1,
        "sep_token_id": 2,
    }  # fmt: skip


def t5(s: Sizes, draw: random.Random) -> dict[str, Any]:
    return {
        "d_model": s.hidden, "d_kv": s.dim, "d_ff": s.inner, "num_layers": s.layers, "num_heads": s.heads,
        "dropout_rate": 0.0, "decoder_start_token_id": 0, "feed_forward_proj": draw.choice(("relu", "gated-gelu")),
    }  # fmt: skip


def bart(s: Sizes, _draw: random.Random) -> dict[str, Any]:
    return {
        "d_model": s.width, "encoder_layers": s.layers, "decoder_layers": s.layers, "encoder_attention_heads": s.heads,
        "decoder_attention_heads": s.heads, "encoder_ffn_dim": s.inner, "decoder_ffn_dim": s.inner, "dropout": 0.0,
        "max_position_embeddings": LONGEST, "decoder_start_token_id": 2,
    }  # fmt: skip


def mixture(name: str) -> Callable[[Sizes, random.Random], dict[str, Any]]:
    """Sizes of a mixture of experts of :mod:`tests.support.moe`, whose own few options are kept."""

    def options(s: Sizes, draw: random.Random) -> dict[str, Any]:
        found = moe.config_of(name, llama(s, draw) | {"intermediate_size": s.inner})
        for key in ("num_local_experts", "num_experts"):
            if key in found:
                found[key] = draw.choice((3, 4, 6))
        for key in ("moe_intermediate_size", "shared_expert_intermediate_size"):
            if key in found:
                found[key] = 4 * draw.randint(3, 12)
        if found["hidden_size"] % 4:
            found["hidden_size"] = 4 * s.heads  # grouped_mm wants rows of 16 bytes
        if name == "Olmoe":  # its norms of queries are as wide as the hidden states
            found |= {"hidden_size": s.width, "head_dim": s.dim}
        if "router_aux_loss_coef" in found and draw.random() < 0.5:
            found["output_router_logits"] = False
        return found

    return options
