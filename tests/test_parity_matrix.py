"""The full cross of families, head counts, degrees, ZeRO stages and ties: ``make test-matrix``."""

from __future__ import annotations

import functools

import pytest

from tests.support.models import FAMILIES
from tests.support.ranks import on_ranks
from tests.test_parity import LIMITS, name_of, run_cases

pytestmark = pytest.mark.slow

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


@functools.cache
def launched(world: int, tp: int) -> list[list[dict[str, float] | str]]:
    return on_ranks(world, run_cases, tp, cases_for(tp), timeout_s=7200)


@pytest.mark.parametrize(
    ("world", "tp", "index"),
    [
        pytest.param(tp * dp, tp, index, id=f"tp{tp}xdp{dp}-{name_of(case)}")
        for tp in (2, 4)
        for dp in (1, 2)
        for index, case in enumerate(cases_for(tp))
    ],
)
def test_equals_one_process(world, tp, index):
    for rank, results in enumerate(launched(world, tp)):
        errors = results[index]
        assert not isinstance(errors, str), f"rank {rank}:\n{errors}"
        assert not {name: value for name, value in errors.items() if not value <= LIMITS[name]}
