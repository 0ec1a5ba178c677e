"""Loops of accelerate's, PEFT's and transformers' scripts: tp 2 x dp 2 reports what one plain process reports."""

from __future__ import annotations

import functools
import traceback
from typing import Any

import pytest
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, ProfileKwargs, ProjectConfiguration

import tp_plugin
from tests.habits import loops, tasks
from tests.habits.alike import differences
from tests.support.configs import auto_config
from tests.support.ranks import on_ranks

TP, DP, ROWS = 2, 2, 2  # rows of one reader of four ranks; one process reads those of both
HABITS = {
    "language_modeling": (1, 2, 0.5),  # ZeRO stage, accumulation, clipping
    "folds": (2, 1, 0.0),
    "translated": (3, 1, 0.0),
    "searched": (1, 1, 0.0),
    "set_later": (1, 1, 0.0),
    "planned": (1, 1, 0.0),
    "goes_on": (1, 1, 0.0),
}
FIRST_ONLY = {"language_modeling": ("told",), "searched": ("weights",)}  # what rank 0 alone has


def config(stage: int, clip: float) -> dict:
    ours = {"tensor_parallel": {"autotp_size": TP}, "tp_plugin": {"quiet": True}, "gradient_clipping": clip}
    return auto_config(stage, **{"zero_allow_untested_optimizer": True} | ours)


def run(name: str, sharded: bool) -> Any:
    stage, gas, clip = HABITS[name]
    project = ProjectConfiguration(str(loops.shared_folder()), automatic_checkpoint_naming=True, total_limit=1)
    settings = config(stage, clip) | (loops.PLANNED if name == "planned" else {})
    how = {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=settings)} if sharded else {"cpu": True}
    stateful = DataLoaderConfiguration(use_stateful_dataloader=name == "goes_on")
    try:
        accelerator = Accelerator(gradient_accumulation_steps=gas, project_config=project, dataloader_config=stateful,
                                  kwargs_handlers=[ProfileKwargs()], **how)  # fmt: skip
        return getattr(tasks if hasattr(tasks, name) else loops, name)(accelerator, ROWS if sharded else ROWS * DP)
    except Exception:
        return traceback.format_exc()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def run_all(sharded: bool) -> dict:
    if sharded:
        tp_plugin.register()
    return {name: run(name, sharded) for name in HABITS}


@functools.cache
def found() -> list[dict]:
    return on_ranks(TP * DP, run_all, True, env={"ACCELERATE_USE_DEEPSPEED": "true"}, timeout_s=600)


@functools.cache
def expected() -> dict:
    return on_ranks(1, run_all, False)[0]


@pytest.mark.parametrize("name", HABITS)
def test_reports_what_one_process_reports(name):
    truth = expected()[name]
    assert isinstance(truth, dict), truth
    for rank, ranks in enumerate(found()):
        ours = ranks[name]
        assert isinstance(ours, dict), f"rank {rank}: {ours}"
        left_out = FIRST_ONLY.get(name, ()) if rank else ()
        kept = {key: value for key, value in truth.items() if key not in left_out}
        wrong = differences(kept, {key: value for key, value in ours.items() if key not in left_out})
        assert not wrong, f"rank {rank}: {wrong}"


def test_the_loops_show_what_they_are_for():
    """A short last step, checkpoints removed and loaded, padded labels, a tracker on rank 0 alone."""
    one = expected()
    modeling = one["language_modeling"]
    assert (modeling["count"], modeling["length"], modeling["kept"]) == (6, 5, ["checkpoint_1"])
    assert modeling["restored"]
    assert len(modeling["told"]) == 2
    assert [ranks["language_modeling"]["told"] for ranks in found()[1:]] == [[]] * 3
    assert one["folds"]["seen"] == 2 * list(range(60, 67))
    assert len({len(row) for row in one["translated"]["labels"]}) > 1
    assert one["set_later"]["steps"] == 2
    assert len(set(one["planned"]["rates"])) == 3
