"""Decoders: separate projections under other names, attributes their forward reads, norms over all heads."""

from __future__ import annotations

from typing import Any

from torch import nn

from tp_plugin.plans import from_transformers
from tp_plugin.plans import plan as p
from tp_plugin.plans.plan import Rule
from tp_plugin.plans.registry import register_family

LLAMA_ATTENTION = (
    Rule("**.self_attn.q_proj", p.COLUMN),
    Rule("**.self_attn.k_proj", p.COLUMN),
    Rule("**.self_attn.v_proj", p.COLUMN),
    Rule("**.self_attn.o_proj", p.ROW),
)
LLAMA_MLP = (
    Rule("**.mlp.gate_proj", p.COLUMN),
    Rule("**.mlp.up_proj", p.COLUMN),
    Rule("**.mlp.down_proj", p.ROW),
)


@register_family("phi3")
def phi3(_model: nn.Module) -> tuple[Rule, ...]:
    return (
        Rule(
            "**.self_attn.qkv_proj",
            p.COLUMN,
            role="q|k|v",
            local=(
                ("config.num_attention_heads", p.QUERY_HEADS),
                ("num_key_value_heads", p.KV_HEADS),
                ("num_key_value_groups", p.GROUPS),
            ),
        ),
        Rule("**.self_attn.o_proj", p.ROW),
        Rule("**.mlp.gate_up_proj", p.COLUMN, blocks=2),
        Rule("**.mlp.down_proj", p.ROW),
    )


@register_family("olmo2", "olmo3")
def olmo2(_model: nn.Module) -> tuple[Rule, ...]:
    return (
        *LLAMA_ATTENTION,
        Rule("**.self_attn.q_norm", p.WIDE_NORM, role="query"),
        Rule("**.self_attn.k_norm", p.WIDE_NORM, role="key"),
        *LLAMA_MLP,
    )


@register_family("cohere")
def cohere(_model: nn.Module) -> tuple[Rule, ...]:
    return (
        *LLAMA_ATTENTION,
        Rule("**.self_attn.q_norm.weight", p.PER_HEAD, role="query", up=2, optional=True),  # with use_qk_norm
        Rule("**.self_attn.k_norm.weight", p.PER_HEAD, role="key", up=2, optional=True),
        *LLAMA_MLP,
    )


@register_family("apertus")
def apertus(model: nn.Module) -> tuple[Rule, ...]:
    """As HF has it, and the activation has parameters, which act on this rank's features."""
    return (Rule("**.mlp.act_fn", p.PARTIAL), *from_transformers.rules_of(model))


@register_family("gemma3n_text")
def gemma3n(model: Any) -> tuple[Rule, ...]:
    """As HF has it, but an MLP that keeps the largest of all its features needs all of them."""
    sparse = [layer for layer, share in enumerate(model.config.activation_sparsity_pattern) if share > 0]
    whole = (Rule(f"**.layers.{layer}.mlp.*", p.REPLICATED) for layer in sparse)
    tables = Rule("**.embed_tokens_per_layer", p.VOCAB_EMBEDDING)
    return (tables, *whole, *from_transformers.rules_of(model))


@register_family("gemma4_text")
def gemma4(model: nn.Module) -> tuple[Rule, ...]:
    """As HF has it, and the embeddings of each layer are a vocabulary's too."""
    tables = Rule("**.embed_tokens_per_layer", p.VOCAB_EMBEDDING, optional=True)
    return (tables, *from_transformers.rules_of(model))


@register_family("stablelm")
def stablelm(_model: nn.Module) -> tuple[Rule, ...]:
    local = (("num_heads", p.QUERY_HEADS), ("num_key_value_heads", p.KV_HEADS), ("num_key_value_groups", p.GROUPS))
    return (
        Rule("**.self_attn.q_proj", p.COLUMN, local=local),
        *LLAMA_ATTENTION[1:],
        *(
            rule
            for name, role in (("q_layernorm", "query"), ("k_layernorm", "key"))  # with qk_layernorm
            for rule in (
                Rule(f"**.self_attn.{name}", p.EACH_HEAD, role=role, optional=True),
                Rule(f"**.self_attn.{name}.norms.*", p.PARTIAL, optional=True),
            )
        ),
        *LLAMA_MLP,
    )


@register_family("gptj", "codegen")
def gptj(model: nn.Module) -> tuple[Rule, ...]:
    local = (("num_attention_heads", p.QUERY_HEADS),)
    packed = model.config.model_type == "codegen"  # type: ignore[union-attr]
    return (
        *(
            (Rule("**.attn.qkv_proj", p.COLUMN, role="4x q|v|k", local=local),)
            if packed
            else (
                Rule("**.attn.q_proj", p.COLUMN, local=local),
                Rule("**.attn.k_proj", p.COLUMN),
                Rule("**.attn.v_proj", p.COLUMN),
            )
        ),
        Rule("**.attn.out_proj", p.ROW),
        Rule("**.mlp.fc_in", p.COLUMN),
        Rule("**.mlp.fc_out", p.ROW),
    )


@register_family("gpt_neo")
def gpt_neo(_model: nn.Module) -> tuple[Rule, ...]:
    return (
        Rule("**.attention.q_proj", p.COLUMN, local=(("num_heads", p.QUERY_HEADS),)),
        Rule("**.attention.k_proj", p.COLUMN),
        Rule("**.attention.v_proj", p.COLUMN),
        Rule("**.attention.out_proj", p.ROW),
        Rule("**.mlp.c_fc", p.COLUMN),
        Rule("**.mlp.c_proj", p.ROW),
    )


@register_family("opt")
def opt(_model: nn.Module) -> tuple[Rule, ...]:
    return (
        Rule("**.self_attn.q_proj", p.COLUMN, local=(("num_heads", p.QUERY_HEADS),)),
        Rule("**.self_attn.k_proj", p.COLUMN),
        Rule("**.self_attn.v_proj", p.COLUMN),
        Rule("**.self_attn.out_proj", p.ROW),
        Rule("**.layers.*.fc1", p.COLUMN),
        Rule("**.layers.*.fc2", p.ROW),
        Rule("**.layers.*.self_attn_layer_norm", p.REPLICATED),
        Rule("**.layers.*.final_layer_norm", p.REPLICATED),
    )
