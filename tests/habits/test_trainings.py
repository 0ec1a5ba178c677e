"""Scripts with HF Trainer: four ranks, two for a group, report what one plain process reports."""

from __future__ import annotations

import functools
import os
import traceback
from typing import Any

import pytest

import tp_plugin
from tests.habits import trainings
from tests.habits.alike import differences
from tests.support.ranks import on_ranks

HABITS = ("scaled_rate", "answers", "smoothed", "reported", "autotp")
REFUSED = "asks_a_shard_for_the_vocabulary"


def run_all(tp: int | None) -> dict[str, Any]:
    if tp is None:
        for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(key, None)
    else:
        tp_plugin.register()
    found = {}
    for name in (*HABITS, REFUSED):
        try:
            found[name] = getattr(trainings, name)(tp)
        except Exception as failure:
            traceback.print_exc()
            found[name] = f"{type(failure).__name__}: {failure}"
    return found


@functools.cache
def found() -> list[dict]:
    return on_ranks(4, run_all, 2, env={"ACCELERATE_USE_DEEPSPEED": "true"}, timeout_s=600)


@functools.cache
def expected() -> dict:
    return on_ranks(1, run_all, None)[0]


@pytest.mark.parametrize("name", HABITS)
def test_reports_what_one_process_reports(name):
    truth = expected()[name]
    assert isinstance(truth, dict), truth
    for rank, ranks in enumerate(found()):
        ours = ranks[name]
        assert isinstance(ours, dict), f"rank {rank}: {ours}"
        if name == "answers" and rank:  # Trainer computes these metrics where it saves
            truth = truth | {"evaluated": {key: truth["evaluated"][key] for key in ours["evaluated"]}}
        wrong = differences(truth, ours)
        assert not wrong, f"rank {rank}: {wrong}"


def test_the_trainings_show_what_they_are_for():
    one = expected()
    assert one["scaled_rate"]["rows"] == trainings.ROWS
    assert one["answers"]["evaluated"]["steps"] == 2
    assert {"all_results.json", "trainer_state.json", "README.md", "model.safetensors"} <= set(one["reported"]["files"])
    assert len(one["reported"]["loss"]) == 4


def test_a_resize_by_the_rows_of_a_shard_is_refused_on_every_rank():
    assert expected()[REFUSED]["rows"] == 131
    for rank in found():
        assert rank[REFUSED].startswith("TensorParallelError: resize_token_embeddings(100) needs full embeddings")
