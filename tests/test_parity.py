"""TP x ZeRO through DeepSpeed's slot against one unsharded process: losses, norms, gradients, updates, replicas.

One launch of ranks trains many configurations, since DeepSpeed's groups are made once a process; each configuration
is a test of its own all the same. The full cross of families and stages is ``make test-matrix``.
"""

from __future__ import annotations

import pytest

from tests.support.matrix import Matrix
from tests.support.models import FAMILIES

# every configuration of one launch: (world, tp) -> cases
CASES: dict[tuple[int, int], list[dict]] = {
    (2, 2): [
        *[{"family": family, "stage": stage} for family, stage in zip(FAMILIES, (1, 2, 3, 1, 2, 3, 0), strict=True)],
        {"family": "Llama", "stage": 0},
        {"family": "Llama", "stage": 1, "tied": True},
        {"family": "Qwen3", "stage": 3, "tied": True},
        {"family": "Gemma2", "stage": 1, "tied": False},
        *[{"family": "Llama", "stage": 1, "heads": heads} for heads in ((4, 4), (4, 1), (8, 2), (6, 3), (6, 2))],
        *[{"family": "Qwen3", "stage": stage, "heads": (6, 3)} for stage in (0, 2, 3)],
        {"family": "Qwen2", "stage": 3, "heads": (4, 1)},
        {"family": "Llama", "stage": 2, "optimizer": "sgd"},
        *[{"family": "Qwen2", "stage": stage, "heads": (6, 3), "offload": True} for stage in (1, 2, 3)],
    ],
    (4, 2): [
        *[{"family": "Qwen3", "stage": stage} for stage in (0, 1, 2, 3)],
        *[{"family": "Qwen2", "stage": stage, "heads": (6, 3), "tied": True} for stage in (0, 1, 2, 3)],
        {"family": "Llama", "stage": 1, "offload": True, "heads": (6, 3)},
        {"family": "Llama", "stage": 3, "offload": True},
        {"family": "Gemma3", "stage": 1, "optimizer": "sgd"},
    ],
    (4, 4): [
        *[{"family": "Qwen2", "stage": stage, "heads": heads}
          for stage, heads in zip((0, 1, 2, 3), ((8, 4), (8, 2), (4, 1), (12, 3)), strict=True)],
        *[{"family": "Qwen3", "stage": 1, "heads": (12, 3), "optimizer": name} for name in ("adamw", "sgd")],
        {"family": "Llama", "stage": 3, "heads": (8, 2), "tied": True},
    ],
    (8, 4): [{"family": "Qwen3", "stage": 2, "heads": (12, 3)}],
}  # fmt: skip
EIGHT_RANKS = [
    {"family": "Qwen3", "stage": stage, "heads": heads}
    for stage, heads in zip((0, 1, 3), ((8, 4), (8, 2), (4, 1)), strict=True)
]


HEADS = {2: ((4, 4), (4, 2), (4, 1), (8, 2), (6, 3), (6, 2)), 4: ((8, 2), (8, 4), (4, 1), (12, 3))}


def cases_for(tp: int) -> list[dict]:
    families = [
        {"family": family, "stage": stage, "heads": HEADS[tp][1], "tied": tied}
        for family in FAMILIES
        for stage in (0, 1, 2, 3)
        for tied in (True, False)
    ]
    heads = [
        {"family": "Qwen3", "stage": stage, "heads": heads, "optimizer": optimizer}
        for heads in HEADS[tp]
        for stage in (0, 1, 2, 3)
        for optimizer in ("adamw", "sgd")
    ]
    offloaded = [
        {"family": "Qwen2", "stage": stage, "heads": heads, "offload": True}
        for heads in HEADS[tp]
        for stage in (1, 2, 3)
    ]
    return families + heads + offloaded


EVERY_DAY = Matrix(CASES, 900)
AT_LENGTH = Matrix(
    {(tp * dp, tp): cases_for(tp) + EIGHT_RANKS * (tp * dp == 8) for tp in (2, 4) for dp in (1, 2)}, 7200
)


@pytest.mark.parametrize(("world", "tp", "index"), EVERY_DAY.parameters())
def test_equals_one_process(world, tp, index):
    EVERY_DAY.check(world, tp, index)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "tp", "index"), AT_LENGTH.parameters())
def test_equals_one_process_everywhere(world, tp, index):
    AT_LENGTH.check(world, tp, index)
