"""What HF's plans leave open in mixtures of experts and latent attentions: rules that go before them.

HF's plans shard the fused experts (style ``moe_tp_experts``) and mostly the shared experts. They say nothing of the latent
projections beside the columns, nothing of which blocks add up partial results, and some leave out the attention or the
shared expert.
"""

from __future__ import annotations

from torch import nn

from tp_plugin.plans import plan as p
from tp_plugin.plans.plan import Rule

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
_GATED_SHARED = {"mlp": p.SUM, "mlp.shared_expert_gate": p.ENTER, **_at("mlp.shared_expert", _MLP)}

MOE_FAMILIES: dict[str, dict[str, str]] = {
    "deepseek_v2": {**_LATENT_ATTENTION, "mlp": p.SUM},
    "deepseek_v3": {**_LATENT_ATTENTION, "mlp": p.SUM},
    "dots1": {"mlp": p.SUM},
    "ernie4_5_moe": {"mlp": p.SUM},
    "glm4_moe": {"mlp": p.SUM, "self_attn.q_norm": p.PARTIAL, "self_attn.k_norm": p.PARTIAL},
    "gpt_oss": {**_at("self_attn", _ATTENTION), "mlp.experts": p.EXPERTS},
    "granitemoe": _at("self_attn", _ATTENTION),
    "qwen2_moe": _GATED_SHARED,
}
"""``model_type`` -> module inside a decoder layer -> style."""


def rules_of(model: nn.Module) -> list[Rule]:
    """The rules for a model of one of :data:`MOE_FAMILIES`; none for any other."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    found = MOE_FAMILIES.get(model_type, {}) if isinstance(model_type, str) else {}
    return [Rule(f"**.layers.*.{name}", style, "family", optional=True) for name, style in found.items()]
