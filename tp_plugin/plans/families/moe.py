"""Rules of mixtures of experts and latent attentions that complete HF's plans, and go before them.

HF's plans shard the fused experts (style ``moe_tp_experts``) and mostly the shared experts. They have no entries for
the latent projections beside the columns, nor for the blocks that add up partial results. Some lack the attention or
the shared experts. Some gather an attention's queries and keys for a norm that needs their mean square only.
"""

from __future__ import annotations

from torch import nn

from tp_plugin.plans import from_transformers
from tp_plugin.plans import plan as p
from tp_plugin.plans.plan import Rule
from tp_plugin.plans.registry import register_family

Rules = tuple[Rule, ...]


def _in_layers(place: str, **styles: str) -> Rules:
    """Rules for children of ``place`` in every decoder layer; a model has those that it is configured with."""
    return tuple(Rule(f"**.layers.*.{place}.{name}", style, optional=True) for name, style in styles.items())


def _by_query(name: str) -> Rules:
    """A column of an attention that gives something for each query head."""
    return (Rule(f"**.layers.*.self_attn.{name}", p.COLUMN, role="query", optional=True),)


def _mlp(place: str) -> Rules:
    return _in_layers(place, gate_proj=p.COLUMN, up_proj=p.COLUMN, down_proj=p.ROW)


def _sum(place: str) -> Rules:
    return (Rule(f"**.layers.*.{place}", p.SUM, optional=True),)


ATTENTION = _in_layers("self_attn", q_proj=p.COLUMN, k_proj=p.COLUMN, v_proj=p.COLUMN, o_proj=p.ROW)
HEAD_NORMS = _in_layers("self_attn", q_norm=p.PARTIAL, k_norm=p.PARTIAL)
WIDE_NORMS = (
    Rule("**.layers.*.self_attn.q_norm", p.WIDE_NORM, role="query"),
    Rule("**.layers.*.self_attn.k_norm", p.WIDE_NORM, role="key"),
)


def _latent(place: str = "self_attn") -> Rules:
    return _in_layers(
        place,
        q_proj=p.COLUMN,
        q_a_proj=p.REPLICATED,
        q_a_layernorm=p.REPLICATED,
        q_b_proj=p.COLUMN,
        kv_a_proj_with_mqa=p.LATENT,
        kv_a_layernorm=p.REPLICATED,
        kv_b_proj=p.COLUMN,
        o_proj=p.ROW,
    )


LATENT_ATTENTION = _latent()
INDEXER = _in_layers("self_attn", **{"indexer.**": p.REPLICATED})  # picks keys for all heads, without a gradient
SHARED_EXPERTS = _mlp("mlp.shared_experts") + _sum("mlp")
GATED_SHARED_EXPERT = _mlp("mlp.shared_expert") + _sum("mlp") + _in_layers("mlp", shared_expert_gate=p.ENTER)
GRANITE_SHARED = (
    Rule("**.layers.*.shared_mlp.input_linear", p.COLUMN, blocks=2, optional=True),
    Rule("**.layers.*.shared_mlp.output_linear", p.ROW, optional=True),
)
SINKS = (Rule("**.layers.*.self_attn.sinks", p.PER_HEAD, role="query", optional=True),)

MOE_FAMILIES: dict[str, Rules] = {
    "afmoe": ATTENTION + HEAD_NORMS + _in_layers("self_attn", gate_proj=p.COLUMN) + _mlp("mlp") + SHARED_EXPERTS,
    "aria_text": SHARED_EXPERTS,
    "axk1": LATENT_ATTENTION,  # a norm of the sum: the shared experts leave by themselves
    "axk2": LATENT_ATTENTION + INDEXER + _by_query("q_gate_proj") + SHARED_EXPERTS,
    "cohere2_moe": SHARED_EXPERTS,
    "deepseek_v2": LATENT_ATTENTION + SHARED_EXPERTS,
    "deepseek_v3": LATENT_ATTENTION + SHARED_EXPERTS,
    "deepseek_v32": LATENT_ATTENTION + INDEXER + SHARED_EXPERTS,
    "dots1": SHARED_EXPERTS,
    "dots3_note_text": LATENT_ATTENTION
    + INDEXER
    + _in_layers("self_attn", k_rope_only_layernorm=p.PARTIAL, g_proj=p.COLUMN)
    + SHARED_EXPERTS,
    "ernie4_5_moe": SHARED_EXPERTS,
    "exaone_moe": SHARED_EXPERTS,
    "flex_olmo": ATTENTION + WIDE_NORMS,
    "flint": ATTENTION + HEAD_NORMS + SINKS + _mlp("mlp.shared_expert") + _sum("mlp"),
    "glm4_moe": HEAD_NORMS + SHARED_EXPERTS,
    "glm4_moe_lite": LATENT_ATTENTION + SHARED_EXPERTS,
    "glm4v_moe_text": HEAD_NORMS + SHARED_EXPERTS,
    "glm_moe_dsa": LATENT_ATTENTION + INDEXER + SHARED_EXPERTS,
    "gpt_oss": (Rule("**.layers.*.mlp.experts", p.EXPERTS), *ATTENTION, *SINKS),
    "granitemoe": ATTENTION,
    "granitemoehybrid": ATTENTION + GRANITE_SHARED,
    "granitemoeshared": ATTENTION + GRANITE_SHARED,
    "hunyuan_v1_moe": ATTENTION
    + _in_layers("self_attn", query_layernorm=p.PARTIAL, key_layernorm=p.PARTIAL)
    + _mlp("mlp.shared_mlp")
    + _sum("mlp"),
    "hy_v3": SHARED_EXPERTS,
    "hy_v4": LATENT_ATTENTION + INDEXER + _by_query("gate_proj") + SINKS + SHARED_EXPERTS,
    "jamba": ATTENTION + _mlp("feed_forward"),
    "kolibri1": SHARED_EXPERTS,
    "laguna": SHARED_EXPERTS,
    "lfm2_moe": _in_layers("self_attn", q_proj=p.COLUMN, k_proj=p.COLUMN, v_proj=p.COLUMN, out_proj=p.ROW)
    + _in_layers("self_attn", q_layernorm=p.PARTIAL, k_layernorm=p.PARTIAL)
    + _in_layers("feed_forward", w1=p.COLUMN, w3=p.COLUMN, w2=p.ROW),
    "llama4_text": _mlp("feed_forward.shared_expert") + _sum("feed_forward"),
    "longcat_flash": _latent("self_attn.*"),
    "minicpm3": LATENT_ATTENTION,
    "minimax_m2": ATTENTION + WIDE_NORMS,
    "mistral4": LATENT_ATTENTION + SHARED_EXPERTS,
    "nemotron_h": _in_layers("mixer", q_proj=p.COLUMN, k_proj=p.COLUMN, v_proj=p.COLUMN, o_proj=p.ROW)
    + _in_layers("mixer", up_proj=p.COLUMN, down_proj=p.ROW)
    + _in_layers("mixer.shared_experts", up_proj=p.COLUMN, down_proj=p.ROW),
    "nllb-moe": _in_layers("self_attn", q_proj=p.COLUMN, k_proj=p.COLUMN, v_proj=p.COLUMN, out_proj=p.ROW)
    + _in_layers("cross_attention", q_proj=p.COLUMN, k_proj=p.COLUMN, v_proj=p.COLUMN, out_proj=p.ROW)
    + _in_layers("ffn", fc1=p.COLUMN, fc2=p.ROW)
    + _in_layers("ffn.experts.*", fc1=p.COLUMN, fc2=p.ROW),  # modules of their own: each is a region
    "olmoe": ATTENTION + WIDE_NORMS,
    "phimoe": ATTENTION,
    "qwen2_moe": GATED_SHARED_EXPERT,
    "qwen3_5_moe_text": GATED_SHARED_EXPERT,
    "qwen3_moe": HEAD_NORMS,
    "qwen3_next": GATED_SHARED_EXPERT,
    "qwen3_omni_moe_text": HEAD_NORMS,
    "qwen3_vl_moe_text": HEAD_NORMS,
    "solar_open": SHARED_EXPERTS,
    "youtu": LATENT_ATTENTION,
    "zaya": (Rule("**.layers.*.mlp.experts", p.EXPERTS),),
}
"""``model_type`` -> rules beside HF's."""


@register_family(*MOE_FAMILIES)
def rules(model: nn.Module) -> Rules:
    """Ours, then HF's: the first that matches counts."""
    model_type: str = model.config.model_type  # type: ignore[union-attr, assignment]
    return MOE_FAMILIES[model_type] + tuple(from_transformers.rules_of(model))
