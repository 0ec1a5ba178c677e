"""Configs made complete: what the defaults of a class leave open, every checkpoint says."""

from __future__ import annotations

from typing import Any

LEFT_OPEN = {
    "vocab_size": 131, "num_experts_per_tok": 2, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "pad_token_id": 0,
}  # fmt: skip
"""Fields that some classes leave at None and their models cannot do without."""


def complete(config: Any) -> None:
    """What a class's defaults leave open and its model cannot do without; every checkpoint says it."""
    fields = vars(config)
    for name, value in LEFT_OPEN.items():
        if fields.get(name, 0) is None:
            fields[name] = value
    if fields.get("num_key_value_heads", 0) is None and type(fields.get("num_attention_heads")) is int:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if config.model_type == "xmod":
        fields["default_language"] = fields.get("default_language") or fields["languages"][0]
    heads, hidden = fields.get("num_attention_heads"), fields.get("hidden_size")
    if type(heads) is int and type(hidden) is int and 0 < heads <= hidden and fields.get("head_dim", 0) is None:
        fields["head_dim"] = hidden // heads
    elif type(heads) is int and type(hidden) is int and heads > 0 and hidden % heads and "head_dim" not in fields:
        fields["head_dim"] = (hidden // heads + 15) // 16 * 16


def explicit_sections(config: Any) -> None:
    """Multimodal rotary sections that a Qwen- or GLM-like text model takes for granted."""
    fields = vars(config)
    rope = fields.get("rope_parameters")
    heads, hidden = fields.get("num_attention_heads"), fields.get("hidden_size")
    if not (isinstance(rope, dict) and "rope_theta" in rope and heads and hidden and "vocab_size" in fields):
        return
    share = rope.get("partial_rotary_factor") or fields.get("partial_rotary_factor") or 1.0
    rotary = int((fields.get("head_dim") or hidden // heads) * share)
    if rotary in (64, 128):
        rope.setdefault("mrope_section", [rotary // 8, rotary * 3 // 16, rotary * 3 // 16])


def join(vision: Any, text: Any) -> None:
    """A vision tower gives what its text model takes; the defaults of some classes were never tried together."""
    fields, hidden = vars(vision), getattr(text, "hidden_size", None)
    if type(hidden) is int and type(fields.get("out_hidden_size")) is int:
        fields["out_hidden_size"] = hidden
    elif type(hidden) is int and type(fields.get("embed_dim")) is int and "mlp_ratio" in fields:  # Qwen2-VL's
        fields["hidden_size"] = hidden
