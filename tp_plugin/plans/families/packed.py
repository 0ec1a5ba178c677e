"""Decoders that pack queries, keys and values in one weight, some of them with ALiBi, GPT-2 in transposed weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from tp_plugin.errors import TensorParallelError
from tp_plugin.plans import plan as p
from tp_plugin.plans.plan import Rule
from tp_plugin.plans.registry import register_family


@register_family("gpt2")
def gpt2(_model: nn.Module) -> tuple[Rule, ...]:
    local = (("split_size", p.QUERY_WIDTH), ("num_heads", p.QUERY_HEADS))
    return (
        Rule("**.h.*.attn.c_attn", p.COLUMN, role="q|k|v", local=local),
        Rule("**.h.*.attn.c_proj", p.ROW),
        Rule("**.h.*.crossattention.q_attn", p.COLUMN, role="query", local=local, optional=True),
        Rule("**.h.*.crossattention.c_attn", p.COLUMN, role="k|v", optional=True),
        Rule("**.h.*.crossattention.c_proj", p.ROW, optional=True),
        Rule("**.h.*.mlp.c_fc", p.COLUMN),
        Rule("**.h.*.mlp.c_proj", p.ROW),
    )


@register_family("gpt_neox")
def gpt_neox(_model: nn.Module) -> tuple[Rule, ...]:
    return (
        Rule("**.attention.query_key_value", p.COLUMN, role="grouped"),
        Rule("**.attention.dense", p.ROW),
        Rule("**.mlp.dense_h_to_4h", p.COLUMN),
        Rule("**.mlp.dense_4h_to_h", p.ROW),
    )


@register_family("gpt_neox_japanese", "persimmon")
def gpt_neox_japanese(model: Any) -> tuple[Rule, ...]:
    persimmon = model.config.model_type == "persimmon"
    attention, heads = ("self_attn", "num_heads") if persimmon else ("attention", "num_attention_heads")
    return (
        Rule(f"**.{attention}.query_key_value", p.COLUMN, role="grouped", local=((heads, p.QUERY_HEADS),)),
        Rule(f"**.{attention}.dense", p.ROW),
        Rule(f"**.{attention}.q_layernorm", p.PARTIAL, optional=True),  # one norm for all heads
        Rule(f"**.{attention}.k_layernorm", p.PARTIAL, optional=True),
        Rule(f"**.{attention}", p.REPLICATED),  # its dense_bias, which the layer adds
        Rule("**.mlp.dense_h_to_4h", p.COLUMN),
        Rule("**.mlp.dense_4h_to_h", p.ROW),
    )


@register_family("bloom")
def bloom(model: Any) -> tuple[Rule, ...]:
    if model.config.pretraining_tp > 1 and model.config.slow_but_exact:
        raise TensorParallelError(
            "BLOOM with slow_but_exact multiplies slices of weights by hand, which a sharded weight cannot serve; set "
            "slow_but_exact: false in the model's config."
        )
    return (
        Rule(
            "**.self_attention.query_key_value",
            p.COLUMN,
            role="grouped",
            local=(("num_heads", p.QUERY_HEADS),),
            inputs=("alibi",),
        ),
        Rule("**.self_attention.dense", p.ROW),
        Rule("**.mlp.dense_h_to_4h", p.COLUMN),
        Rule("**.mlp.dense_4h_to_h", p.ROW),
    )


@register_family("falcon")
def falcon(model: Any) -> tuple[Rule, ...]:
    """Three layouts: groups of queries with their key and value, one head each of all three, one KV head for all.

    ``FalconLinear`` is a linear layer written out.
    """
    config = model.config
    grouped = config.new_decoder_architecture or not config.multi_query
    return (
        Rule(
            "**.self_attention.query_key_value",
            p.COLUMN,
            role="grouped" if grouped else "q|k|v",
            local=(("num_heads", p.QUERY_HEADS), ("num_kv_heads", p.KV_HEADS)),
            inputs=("alibi", "attention_mask") if config.alibi else (),  # ALiBi is added into the mask
            equivalent=True,
        ),
        Rule("**.self_attention.dense", p.ROW, equivalent=True),
        Rule("**.mlp.dense_h_to_4h", p.COLUMN, equivalent=True),
        Rule("**.mlp.dense_4h_to_h", p.ROW, equivalent=True),
    )


@register_family("mpt")
def mpt(_model: nn.Module) -> tuple[Rule, ...]:
    return (
        Rule("**.attn.Wqkv", p.COLUMN, role="q|k|v", local=(("n_heads", p.QUERY_HEADS),), inputs=("position_bias",)),
        Rule("**.attn.out_proj", p.ROW),
        Rule("**.ffn.up_proj", p.COLUMN),
        Rule("**.ffn.down_proj", p.ROW),
    )
