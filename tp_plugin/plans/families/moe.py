"""What HF's plans leave open in mixtures of experts and latent attentions: rules that go before them.

HF's plans shard the fused experts (style ``moe_tp_experts``) and mostly the shared experts. They say nothing of the
latent projections beside the columns, nothing of which blocks add up partial results, and some leave out the attention
or the shared expert.
"""

from __future__ import annotations

from torch import nn

from tp_plugin.plans import from_transformers
from tp_plugin.plans import plan as p
from tp_plugin.plans.plan import Rule
from tp_plugin.plans.registry import register_family

_ATTENTION = {"q_proj": p.COLUMN, "k_proj": p.COLUMN, "v_proj": p.COLUMN, "o_proj": p.ROW}
_MLP = {"gate_proj": p.COLUMN, "up_proj": p.COLUMN, "down_proj": p.ROW}
_LATENT = {
    "q_proj": p.COLUMN,
    "q_a_proj": p.REPLICATED,
    "q_a_layernorm": p.REPLICATED,
    "q_b_proj": p.COLUMN,
    "kv_a_proj_with_mqa": p.LATENT,
    "kv_a_layernorm": p.REPLICATED,
    "kv_b_proj": p.COLUMN,
    "o_proj": p.ROW,
}


def _at(place: str, rules: dict[str, str]) -> dict[str, str]:
    return {f"{place}.{name}": style for name, style in rules.items()}


_LATENT_ATTENTION = _at("self_attn", _LATENT)
_HEAD_NORMS = _at("self_attn", {"q_norm": p.PARTIAL, "k_norm": p.PARTIAL})
_WIDE_NORMS = {**_at("self_attn", _ATTENTION), **_at("self_attn", {"q_norm": p.WIDE_NORM, "k_norm": p.WIDE_NORM})}
_GATED_SHARED = {"mlp": p.SUM, "mlp.shared_expert_gate": p.ENTER, **_at("mlp.shared_expert", _MLP)}

MOE_FAMILIES: dict[str, dict[str, str]] = {
    "deepseek_v2": {**_LATENT_ATTENTION, "mlp": p.SUM},
    "deepseek_v3": {**_LATENT_ATTENTION, "mlp": p.SUM},
    "dots1": {"mlp": p.SUM},
    "ernie4_5_moe": {"mlp": p.SUM},
    "glm4_moe": {"mlp": p.SUM, **_HEAD_NORMS},
    "gpt_oss": {**_at("self_attn", _ATTENTION), "self_attn.sinks": p.PER_HEAD, "mlp.experts": p.EXPERTS},
    "granitemoe": _at("self_attn", _ATTENTION),
    "olmoe": _WIDE_NORMS,
    "qwen2_moe": _GATED_SHARED,
}
"""``model_type`` -> module or parameter inside a decoder layer -> style."""


@register_family(*MOE_FAMILIES)
def rules(model: nn.Module) -> list[Rule]:
    """Ours, then HF's: the first that matches counts."""
    model_type: str = model.config.model_type  # type: ignore[union-attr, assignment]
    ours = [
        Rule(f"**.layers.*.{name}", style, role=_role(name, style), optional=True)
        for name, style in MOE_FAMILIES[model_type].items()
    ]
    return ours + from_transformers.rules_of(model)


def _role(name: str, style: str) -> str:
    if style == p.PER_HEAD:
        return "query"
    return {"q_norm": "query", "k_norm": "key"}.get(name.rpartition(".")[2], "") if style == p.WIDE_NORM else ""
