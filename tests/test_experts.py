"""Mixtures of experts and latent attention against one unsharded process, through DeepSpeed's slot.

As in ``test_parity.py``: one launch of ranks trains many configurations, each a test of its own.
"""

from __future__ import annotations

import pytest

from tests.support.matrix import Matrix
from tests.support.moe import MORE, SIZES

# of those that transformers has beside, the ones with a router, a latent, an indexer or a layer kind of their own
PECULIAR_FAMILIES = (
    "AXK2", "Cohere2Moe", "Ernie4_5_Moe", "FlexOlmo", "GraniteMoeHybrid", "HYV4", "Jamba", "Lfm2Moe", "Llama4",
    "LongcatFlash", "MiMoV2Flash", "MiniMax", "NemotronH", "Phimoe", "Qwen3Next", "Qwen3_5Moe", "MiniCPM3",
)  # fmt: skip
FEW = ("Mixtral", "Qwen2Moe", "DeepseekV3", "GptOss", "Glm4Moe")
WAYS = [{"family": "Qwen2Moe", "stage": 1, "experts": way} for way in ("eager", "batched_mm")] + [
    {"family": "GptOss", "stage": 1, "experts": way} for way in ("eager", "batched_mm")
]
PECULIAR = [
    {"family": "DeepseekV2", "stage": 1, "q_lora_rank": None},  # queries without a latent
    {"family": "DeepseekV3", "stage": 1, "attention_bias": True, "heads": (3, 3)},  # heads dealt unevenly
    {"family": "GptOss", "stage": 1, "heads": (6, 3)},  # sinks follow the queries; a key head on both ranks
    {"family": "Mixtral", "stage": 1, "intermediate_size": 27, "experts": "eager"},  # widths dealt unevenly
    {"family": "GptOss", "stage": 1, "intermediate_size": 27, "experts": "eager"},
    {"family": "Qwen2Moe", "stage": 1, "checkpointing": False},
    {"family": "DeepseekV3", "stage": 3, "checkpointing": True},
    {"family": "Qwen3Moe", "stage": 2, "offload": True},
]
FAST: dict[tuple[int, int], list[dict]] = {
    (2, 2): [{"family": name, "stage": 1} for name in (*SIZES, *PECULIAR_FAMILIES)]
    + [{"family": name, "stage": 3} for name in FEW] + PECULIAR + WAYS,
    (4, 2): [{"family": name, "stage": 2} for name in ("Mixtral", "DeepseekV3", "GptOss")],
    (4, 4): [{"family": name, "stage": 1, "heads": (8, 4)} for name in ("Qwen2Moe", "DeepseekV3", "Glm4Moe")],
}  # fmt: skip
EIGHT_HEADS: dict[str, dict] = {"GraniteMoeHybrid": {"mamba_n_heads": 8}}  # its state is twice as wide as the model
# it samples among experts of like scores, and a replica draws other numbers than one process for the same tokens
REPLICAS: dict[str, dict] = {"Phimoe": {"router_jitter_noise": 0.0}}


def at_length(name: str, stage: int, world: int, tp: int) -> dict:
    heads = {"heads": (8, 4), **EIGHT_HEADS.get(name, {})} if tp == 4 else {}
    return {"family": name, "stage": stage, **heads, **(REPLICAS.get(name, {}) if world > tp else {})}


# the cases of every day too, which train one step there
SLOW: dict[tuple[int, int], list[dict]] = {
    (world, tp): FAST[world, tp]
    + [
        case
        for stage in (0, 1, 2, 3)
        for name in SIZES | MORE
        if (case := at_length(name, stage, world, tp)) not in FAST[world, tp]
    ]
    for world, tp in FAST
}
EVERY_DAY, AT_LENGTH = Matrix(FAST, 900, steps=1), Matrix(SLOW, 1800)


@pytest.mark.parametrize(("world", "tp", "index"), EVERY_DAY.parameters())
def test_equals_one_process(world, tp, index):
    EVERY_DAY.check(world, tp, index)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "tp", "index"), AT_LENGTH.parameters())
def test_equals_one_process_everywhere(world, tp, index):
    AT_LENGTH.check(world, tp, index)
