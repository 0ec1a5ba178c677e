"""PEFT adapters for the parity harness, no tensor of which has a value that hides bugs (a LoRA's B begins as zeros)."""

from __future__ import annotations

from typing import Any

import peft
import torch

EVERY = {"r": 4, "target_modules": "all-linear"}
ATTENTION = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
ADAPTERS: dict[str, dict[str, Any]] = {
    "every linear": EVERY,
    "several": EVERY | {"others": ("second",)},
    "biases": EVERY | {"bias": "all", "lora_bias": True},
    "DoRA": EVERY | {"use_dora": True},
    "Conv1D DoRA": EVERY | {"use_dora": True, "fan_in_fan_out": True},
    "rsLoRA": EVERY | {"use_rslora": True},
    "patterns": EVERY | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 7}},
    "every Conv1D": EVERY | {"fan_in_fan_out": True},
    "classes": EVERY | {"task_type": "SEQ_CLS"},
    "encoder-decoder": {"r": 4, "target_modules": ["q", "k", "v", "o", "wi", "wo"], "task_type": "SEQ_2_SEQ_LM"},
    "experts": ATTENTION | {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "vocabulary": {"r": 4, "target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "modules to save": {
        "r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "k_proj", "down_proj"],
    },
    "norms to save": {
        "r": 4, "target_modules": ["q_proj"], "modules_to_save": ["q_norm", "k_norm", "norm", "o_proj"],
    },
    "IA3": {
        "kind": "IA3", "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["q_proj", "down_proj"],
    },
    "prompt": {"kind": "PromptTuning", "num_virtual_tokens": 3},
    "prompt encoder": {"kind": "PromptEncoder", "num_virtual_tokens": 3, "encoder_hidden_size": 16},
}  # fmt: skip


def adapt(model: torch.nn.Module, name: str, **more: Any) -> Any:
    """``get_peft_model`` as :data:`ADAPTERS` says, on a whole model or a sharded one; the same numbers for both.

    ``kind`` there is that of the config's class, ``others`` are names of further adapters, of which none is active.
    """
    options = ADAPTERS[name] | more
    kind, others = options.pop("kind", "Lora"), options.pop("others", ())
    config = getattr(peft, f"{kind}Config")
    torch.manual_seed(77)
    before = {id(param) for param in model.parameters()}
    found = peft.get_peft_model(model, config(**{"task_type": "CAUSAL_LM"} | options))
    for other in others:
        found.add_adapter(other, config(**{"task_type": "CAUSAL_LM"} | options))
    with torch.no_grad():
        for index, (_, param) in enumerate(sorted(found.named_parameters())):
            if id(param) in before:
                continue
            layout = getattr(param, "tp_layout", None)
            shape = param.shape if layout is None else layout.shape
            noise = 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(9000 + index))
            param.add_(noise if layout is None else layout.shard(noise, _rank(found)))
    return found


def _rank(model: torch.nn.Module) -> int:
    from tp_plugin.sharding import state_of

    record = state_of(model)
    return 0 if record is None else record.mesh.tp_rank
