"""Loops of accelerate's, PEFT's and transformers' scripts: tp 2 x dp 2 reports what one plain process reports."""

from __future__ import annotations

import functools
import tempfile
import traceback
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, ProjectConfiguration

import tp_plugin
from tests.habits import loops
from tests.support.configs import auto_config
from tests.support.ranks import on_ranks

TP, DP, ROWS = 2, 2, 2  # rows of one reader of four ranks; one process reads those of both
HABITS = {
    "language_modeling": (1, 2, 0.5),  # ZeRO stage, accumulation, clipping
    "folds": (2, 1, 0.0),
    "translated": (3, 1, 0.0),
    "searched": (1, 1, 0.0),
}


def config(stage: int, clip: float) -> dict:
    ours = {"tensor_parallel": {"autotp_size": TP}, "tp_plugin": {"quiet": True}, "gradient_clipping": clip}
    return auto_config(stage, **{"zero_allow_untested_optimizer": True} | ours)


def run(name: str, sharded: bool) -> Any:
    stage, gas, clip = HABITS[name]
    folder = loops.shared_folder()
    project = ProjectConfiguration(str(folder), automatic_checkpoint_naming=True, total_limit=1)
    how = {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=config(stage, clip))} if sharded else {"cpu": True}
    accelerator = Accelerator(gradient_accumulation_steps=gas, project_config=project, **how)
    try:
        return getattr(loops, name)(accelerator, ROWS if sharded else ROWS * DP)
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


def test_probe():
    for name in HABITS:
        print("=====", name)
        print("plain", expected()[name])
        for rank in found():
            print("ours", rank[name])
