"""HF Trainer on 2 and 4 ranks, sharded two ways, reports what it reports in one plain process: every log and metric."""

from __future__ import annotations

import functools
import math
import traceback
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.ranks import on_ranks
from tests.support.trainer_cases import CASES, TP, train

HALF = [name for name, case in CASES.items() if case.arguments.get("bf16")]
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
LIMIT = 1e-4


def train_all(world: int | None) -> dict[str, dict[str, Any] | str]:
    """All cases of a world, or of all in one plain process; a case that raises ends alone."""
    found: dict[str, dict[str, Any] | str] = {}
    for name, case in CASES.items():
        if name not in HALF and world in (None, case.world):
            try:
                found[name] = train(name, None if world is None else TP)
            except Exception:
                found[name] = traceback.format_exc()
    return found


@functools.cache
def trained(world: int) -> list[dict]:
    return on_ranks(world, train_all, world, env=DEEPSPEED, timeout_s=600)


@functools.cache
def plain() -> dict:
    return on_ranks(1, train_all, None, timeout_s=600)[0]


def differences(expected: Any, found: Any, where: str = "") -> list[str]:
    """Where two reports are not the same: numbers by 2e-5 of them, rates, whose clocks are rounded, by 3e-2.

    Arrays are compared by their norms: Adam makes much of a gradient near zero, whose rounding depends on the CPU.
    """
    if isinstance(expected, dict) and isinstance(found, dict):
        keys = sorted(expected.keys() | found.keys())
        return [d for key in keys for d in differences(expected.get(key), found.get(key), f"{where}.{key}")]
    if isinstance(expected, list | tuple) and isinstance(found, list | tuple) and len(expected) == len(found):
        pairs = enumerate(zip(expected, found, strict=True))
        return [d for index, (one, other) in pairs for d in differences(one, other, f"{where}[{index}]")]
    if isinstance(expected, np.ndarray | torch.Tensor) and np.shape(expected) == np.shape(found):
        one, other = np.asarray(expected, np.float64), np.asarray(found, np.float64)
        error = np.linalg.norm(one - other) / (np.linalg.norm(one) or 1.0)
        return [] if error <= LIMIT else [f"{where}: differs by {error:.1e} of its norm"]
    if isinstance(expected, float | int) and isinstance(found, float | int):
        limit = 3e-2 if where.endswith("_per_second") else 2e-5
        return (
            [] if math.isclose(expected, found, rel_tol=limit, abs_tol=1e-7) else [f"{where}: {found}, not {expected}"]
        )
    return [] if type(expected) is type(found) and expected == found else [f"{where}: {found!r}, not {expected!r}"]


@pytest.mark.parametrize("name", [name for name in CASES if name not in HALF])
def test_reports_what_one_process_reports(name):
    expected, case = plain()[name], CASES[name]
    assert isinstance(expected, dict), expected
    for rank, found in enumerate(trained(case.world)):
        ours = found[name]
        assert isinstance(ours, dict), f"rank {rank}: {ours}"
        # the state dict is rank 0's, of the others empty
        wanted = {key: value for key, value in expected.items() if key != "weights" or rank == 0}
        wrong = differences(wanted, {key: ours[key] for key in wanted})
        wrong = [one for one in wrong if one.split(":")[0].split(".")[-1] not in case.differs]
        assert not wrong, f"rank {rank}: {wrong}"


def test_the_cases_show_what_they_are_for():
    """A best model that is not the last, a training stopped early, a rate that was lowered, steps that are counted."""
    found = plain()
    best = found["best"]["state"]
    assert best["best_step"] != "checkpoint-4"
    assert {best["best_step"], "checkpoint-4"} == set(best["kept"])
    assert found["stopped"]["state"]["steps"] < 8
    rates = [entry["learning_rate"] for entry in found["plateau"]["log"] if "learning_rate" in entry]
    assert rates[-1] < rates[0]
    assert found["odd_sizes"]["evaluated"]["eval_steps_per_second"] == pytest.approx(2, rel=3e-2)
    tokens = found["measured"]["log"][0]["train_tokens_per_second"]
    assert tokens == pytest.approx(found["measured"]["log"][0]["num_input_tokens_seen"], rel=3e-2)
    assert trained(TP)[1]["odd_sizes"]["weights"] == {}


# ---- half precision --------------------------------------------------------------------------------------------------


@functools.cache
def half(tp: int, exact: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Losses and norms of each step, and weights after the last, of each case: four models one after another."""
    return on_ranks(tp, train_half, tp, exact, env=DEEPSPEED, group=True)[0]


def train_half(tp: int, exact: bool) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for name in HALF:
        runs = [train(name, tp, exact, seed) for seed in range(4)]
        steps = [entry for run in runs for entry in run["log"] if "loss" in entry]
        found[name] = {key: torch.tensor([entry[key] for entry in steps]) for key in ("loss", "grad_norm")}
        weights = [weight.flatten() for run in runs for _, weight in sorted(run["weights"].items())]
        found[name]["weights"] = torch.cat([torch.empty(0), *weights])  # rank 0 alone has them
    return found


@pytest.mark.parametrize("name", HALF)
def test_bf16_errs_no_more_than_one_process(name):
    """|ours - single precision| <= factor |one unsharded process in bf16 - single precision|.

    The factor is 1.25 for the thousands of weights, 3 for the eight losses and norms: how they are rounded is chance.
    """
    exact, plainly, ours = (half(*how)[name] for how in ((1, True), (1, False), (TP, False)))
    for key, factor in (("weights", 1.25), ("loss", 3), ("grad_norm", 3)):
        error, usual = ((one[key] - exact[key]).norm() for one in (ours, plainly))
        assert usual > 3e-4, "nothing was rounded: not bf16"
        assert error <= factor * usual, f"{key}: {error:.2e} above {factor} times {usual:.2e}"
