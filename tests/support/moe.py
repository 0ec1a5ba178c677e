"""Configurations of small mixtures of experts, by family: two layers, four experts of width 32."""

from __future__ import annotations

from typing import Any

LOCAL, PLAIN, ROUTED = {"num_local_experts": 4}, {"num_experts": 4}, {"n_routed_experts": 4}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6,
    "head_dim": None,
}  # fmt: skip
SHARED = {"moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
ONE_GROUP = {"n_group": 1, "topk_group": 1}
AUX = {"output_router_logits": True, "router_aux_loss_coef": 0.1}

SIZES: dict[str, dict[str, Any]] = {
    "Mixtral": {"intermediate_size": 32, **LOCAL, **AUX},
    "Qwen2Moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, **PLAIN, **AUX},
    "Qwen3Moe": {"moe_intermediate_size": 32, **PLAIN, **AUX},
    "Olmoe": {"intermediate_size": 32, **PLAIN, **AUX},
    "DeepseekV2": {**SHARED, **ROUTED, **LATENT, "n_shared_experts": 2, "topk_method": "group_limited_greedy"},
    "DeepseekV3": {**SHARED, **ROUTED, **LATENT, "n_shared_experts": 1},
    "GptOss": {"intermediate_size": 32, "sliding_window": 8, **LOCAL, **AUX},
    "GraniteMoe": {"intermediate_size": 32, **LOCAL, **AUX, "attention_bias": True},
    "Glm4Moe": {**SHARED, **ROUTED, "n_shared_experts": 1, "attention_bias": True, "use_qk_norm": True},
}


def config_of(family: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the family's config: ``sizes`` that every model has, overridden by its own."""
    merged = sizes | {"num_experts_per_tok": 2} | SIZES[family]
    if "kv_lora_rank" in merged:
        merged["num_key_value_heads"] = merged["num_attention_heads"]  # every head has keys and values of its own
    return {name: value for name, value in merged.items() if value is not None}
