"""Configurations of small mixtures of experts, by family: two layers, four experts of width 32."""

from __future__ import annotations

from typing import Any

LOCAL, PLAIN, ROUTED = {"num_local_experts": 4}, {"num_experts": 4}, {"n_routed_experts": 4}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6,
    "head_dim": None,
}  # fmt: skip
SHARED = {"moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
INDEXER = {"index_topk": 5, "index_n_heads": 2, "index_head_dim": 8}
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
"""The families that users ask for by name."""

MORE: dict[str, dict[str, Any]] = {
    "Afmoe": {
        "moe_intermediate_size": 32, "num_shared_experts": 1, "num_dense_layers": 1, "sliding_window": 8, **PLAIN,
    },
    "AXK1": {**SHARED, **ROUTED, **LATENT, "n_shared_experts": 1, **ONE_GROUP},
    "Cohere2Moe": {"intermediate_size": 32, "num_shared_experts": 1, "sliding_window": 8, **PLAIN},
    "Dots1": {**SHARED, **ROUTED, "n_shared_experts": 1},
    "Ernie4_5_Moe": {
        "moe_intermediate_size": 32, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
    },
    "ExaoneMoe": {"moe_intermediate_size": 32, "num_shared_experts": 1, **ONE_GROUP, **PLAIN},
    "FlexOlmo": {"intermediate_size": 32, **PLAIN, **AUX},
    "Glm4MoeLite": {**SHARED, **ROUTED, **LATENT, "n_shared_experts": 1},
    "GraniteMoeHybrid": {
        "intermediate_size": 32, "shared_intermediate_size": 48, "layers_block_type": ["attention", "mamba"],
        "mamba_n_heads": 4, "mamba_expand": 2, "mamba_d_head": 16, "mamba_d_state": 8, **LOCAL,
    },
    "GraniteMoeShared": {"intermediate_size": 32, "shared_intermediate_size": 48, **LOCAL, **AUX},
    "GraniteMoeSWA": {"intermediate_size": 32, "sliding_window": 8, **LOCAL},
    "HunYuanMoEV1": {"intermediate_size": 32, "moe_topk": 2, **PLAIN},
    "HYV3": {"moe_intermediate_size": 32, "num_shared_experts": 1, **PLAIN},
    "Jamba": {
        "intermediate_size": 32, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4, **PLAIN,
    },
    "Laguna": {
        "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, "sliding_window": 8, **PLAIN,
    },
    "Lfm2Moe": {
        "moe_intermediate_size": 32, "layer_types": ["full_attention", "conv"], "num_dense_layers": 1, **PLAIN,
    },
    "Llama4": {
        "intermediate_size": 32, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2,
        "num_experts_per_tok": 1, **LOCAL,
    },
    "Mellum": {"moe_intermediate_size": 32, **PLAIN},
    "MiniMax": {
        "intermediate_size": 32, "layer_types": ["full_attention", "linear_attention"], "block_size": 4, **LOCAL,
    },
    "MiniMaxM2": {"intermediate_size": 32, **LOCAL},
    "Mistral4": {**SHARED, **ROUTED, **LATENT, "n_shared_experts": 1},
    "NemotronH": {
        "num_hidden_layers": 3, "hybrid_override_pattern": "E*-", "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 48, "n_shared_experts": 1, "mamba_num_heads": 4, "mamba_head_dim": 16,
        "ssm_state_size": 8, "n_groups": 2, "chunk_size": 4, **ONE_GROUP, **ROUTED,
    },
    "Phimoe": {"intermediate_size": 32, **LOCAL},
    "Qwen3Next": {
        "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48,
        "layer_types": ["full_attention", "linear_attention"], "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, **PLAIN,
    },
    "Qwen3_5Moe": {
        "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48,
        "layer_types": ["full_attention", "linear_attention"], "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, **PLAIN,
    },
    "SolarOpen": {"moe_intermediate_size": 32, "n_shared_experts": 1, **ONE_GROUP, **ROUTED},
    "AXK2": {**SHARED, **ROUTED, **LATENT, "n_shared_experts": 1, **INDEXER},
    "DeepseekV32": {**SHARED, **ROUTED, **LATENT, "n_shared_experts": 1, **INDEXER},
    "Flint": {"moe_intermediate_size": 32, "intermediate_size": 48, "sliding_window": 8, **PLAIN},
    "GlmMoeDsa": {**SHARED, **ROUTED, **LATENT, "n_shared_experts": 1, **INDEXER},
    "HYV4": {
        **SHARED, **ROUTED, **LATENT, "n_shared_experts": 1, **INDEXER, "gate_projection_size": 6,
        "initializer_range": 0.2,  # larger gradients of its few scalars, which cancel to noise
    },
    "LongcatFlash": {
        "ffn_hidden_size": 48, "expert_ffn_hidden_size": 32, "zero_expert_num": 2, "moe_topk": 2, "num_layers": 2,
        **LATENT, **ROUTED, "head_dim": 4,
    },
    "MiMoV2Flash": {"moe_intermediate_size": 32, "v_head_dim": 6, "sliding_window": 8, **ONE_GROUP, **ROUTED},
    "MiniCPM3": LATENT,
}  # fmt: skip
"""Others that transformers has."""
CONFIGS = {"Llama4": "Llama4TextConfig", "Qwen3_5Moe": "Qwen3_5MoeTextConfig"}
"""Where it is not the family's name and ``Config``."""


def config_of(family: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the family's config: ``sizes`` that every model has, overridden by its own."""
    merged = sizes | {"num_experts_per_tok": 2} | (SIZES | MORE)[family]
    if "kv_lora_rank" in merged:
        merged["num_key_value_heads"] = merged["num_attention_heads"]  # every head has keys and values of its own
    return {name: value for name, value in merged.items() if value is not None}
