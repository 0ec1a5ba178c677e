"""Adapters of PEFT on sharded models against one process: put in before sharding, and after it ("late").

Loss, clipped norm, the gradient of every adapter tensor, its update, replicas equal to the bit; see test_parity.
"""

from __future__ import annotations

import pytest

from tests.support.matrix import Matrix

CASES = Matrix(
    {
        (2, 2): [
            {"family": "Llama", "stage": 1, "adapter": "several"},
            {"family": "Llama", "stage": 3, "heads": (6, 3), "way": "late",
             "adapter": "biases"},
            {"family": "gpt2", "stage": 2, "adapter": "every Conv1D"},
            {"family": "Llama", "stage": 2, "heads": (4, 1), "adapter": "DoRA"},
            {"family": "Llama", "stage": 2, "way": "load", "tied": False, "adapter": "vocabulary"},
            {"family": "Qwen3", "stage": 3, "way": "zero3 order", "adapter": "every linear"},
            {"family": "gpt2", "stage": 1, "adapter": "Conv1D DoRA"},
            {"family": "phi3", "stage": 3, "way": "late", "adapter": "rsLoRA"},
            {"family": "Llama", "stage": 3, "tied": False, "adapter": "vocabulary"},
            {"family": "Gemma3", "stage": 1, "tied": True, "way": "late", "adapter": "vocabulary"},
            {"family": "Llama", "stage": 2, "tied": False, "adapter": "modules to save"},
            {"family": "Qwen3", "stage": 1, "way": "late", "adapter": "norms to save"},
            {"family": "Llama", "stage": 2, "heads": (4, 1), "tied": False, "way": "late",
             "adapter": "modules to save"},
            {"family": "Qwen3", "stage": 0, "tied": True, "adapter": "tied to save"},
            {"family": "Llama", "stage": 1, "tied": True, "way": "late", "adapter": "tied to save"},
            {"family": "Qwen3", "stage": 3, "tied": True, "adapter": "tied to save"},
            {"family": "Mixtral", "stage": 1, "way": "late", "adapter": "experts"},
            {"family": "Mixtral", "stage": 2, "adapter": "experts"},
            {"family": "Qwen2Moe", "stage": 2, "adapter": "every linear"},
            {"family": "DeepseekV3", "stage": 1, "adapter": "every linear"},
            {"family": "Llama", "stage": 1, "adapter": "PiSSA"},
            {"family": "Qwen3", "stage": 2, "heads": (4, 1), "adapter": "OLoRA"},
            {"family": "Llama", "stage": 1, "adapter": "IA3"},
            {"family": "Llama", "stage": 3, "way": "late", "adapter": "prompt"},
        ],
        (4, 2): [
            {"family": "Llama", "stage": 3, "adapter": "every linear", "checkpointing": True},
            {"family": "Qwen2", "stage": 1, "heads": (6, 3), "offload": True, "way": "late",
             "adapter": "patterns"},
        ],
        (4, 4): [
            {"family": "Qwen2", "stage": 2, "heads": (8, 2), "adapter": "every linear"},
            {"family": "gpt_neox", "stage": 0, "way": "late", "adapter": "every linear"},
        ],
    },
    timeout_s=900,
)  # fmt: skip

FAMILIES = {
    **dict.fromkeys(("Llama", "Qwen3", "Gemma2", "phi3", "gpt_neox", "bloom", "falcon new", "olmo2"), "every linear"),
    **dict.fromkeys(("Qwen2Moe", "DeepseekV3"), "every linear"),
    **dict.fromkeys(("Mixtral", "Qwen3Moe", "GptOss"), "experts"),
    "gpt2": "every Conv1D",
    "t5": "encoder-decoder",
    "gpt2 classes": "classes",
    "bert classes": "classes",
}
KINDS = ("every linear", "vocabulary", "modules to save", "IA3", "prompt", "prompt encoder", "patterns", "biases")
MANY = Matrix(
    {
        (tp * dp, tp): [
            *({"family": family, "stage": (index + dp) % 4, "way": way, "adapter": adapter}
              for index, (family, adapter) in enumerate(FAMILIES.items()) for way in ("slot", "late")),
            *({"family": "Llama", "stage": stage, "way": way, "heads": heads, "tied": False, "adapter": adapter}
              for heads in ((4, 2), (8, 2)) for stage in (0, 1, 2, 3) for way in ("slot", "late")
              for adapter in KINDS if adapter != "IA3" or heads[1] % tp == 0),
            *({"family": "Llama", "stage": stage, "adapter": "every linear", "offload": True} for stage in (1, 2, 3)),
            *({"family": "Qwen2", "stage": stage, "heads": (8, 2), "adapter": "DoRA"} for stage in (0, 1, 2)),
            *({"family": "Llama", "stage": stage, "adapter": "every linear", "checkpointing": reentrant}
              for stage in (1, 3) for reentrant in (True, False)),
        ]
        for tp in (2, 4) for dp in (1, 2)
    },
    timeout_s=7200,
)  # fmt: skip


@pytest.mark.parametrize(("world", "tp", "index"), CASES.parameters())
def test_equals_one_process(world, tp, index):
    CASES.check(world, tp, index)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "tp", "index"), MANY.parameters())
def test_equals_one_process_everywhere(world, tp, index):
    MANY.check(world, tp, index)
