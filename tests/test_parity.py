"""TP x ZeRO through DeepSpeed's slot against one unsharded process: losses, norms, gradients, updates, replicas.

One launch of ranks trains many configurations, since DeepSpeed's groups are made once a process; each configuration
is a test of its own all the same. The full cross of families and stages is ``make test-matrix``.
"""

from __future__ import annotations

import functools
import traceback

import pytest

from tests.support.models import FAMILIES
from tests.support.ranks import on_ranks
from tests.support.train import compare

LIMITS = {"loss": 1e-5, "norm": 1e-5, "grad": 1e-4, "update": 1e-4, "replicas": 0.0}

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
    (8, 4): [
        *[{"family": "Qwen3", "stage": stage, "heads": heads}
          for stage, heads in zip((0, 1, 2, 3), ((8, 4), (12, 3), (8, 2), (4, 1)), strict=True)],
    ],
}  # fmt: skip


def run_cases(tp: int, cases: list[dict]) -> list[dict[str, float] | str]:
    """One rank's share of every case; an exception ends its case only."""
    results: list[dict[str, float] | str] = []
    for case in cases:
        try:
            results.append(compare(tp=tp, **case))
        except Exception:
            results.append(traceback.format_exc())
    return results


@functools.cache
def launched(world: int, tp: int) -> list[list[dict[str, float] | str]]:
    return on_ranks(world, run_cases, tp, CASES[world, tp], timeout_s=900)


def name_of(case: dict) -> str:
    return "-".join(str(value).replace(" ", "") for value in case.values())


PARAMETERS = [
    pytest.param(world, tp, index, id=f"tp{tp}xdp{world // tp}-{name_of(case)}")
    for (world, tp), cases in CASES.items()
    for index, case in enumerate(cases)
]


@pytest.mark.parametrize(("world", "tp", "index"), PARAMETERS)
def test_equals_one_process(world, tp, index):
    for rank, results in enumerate(launched(world, tp)):
        errors = results[index]
        assert not isinstance(errors, str), f"rank {rank}:\n{errors}"
        above = {name: value for name, value in errors.items() if not value <= LIMITS[name]}
        assert not above, f"rank {rank}: {above} exceed {LIMITS}"
