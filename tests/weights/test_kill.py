"""A rank is killed while a checkpoint is written: the ones before stay whole, and no other rank waits for it."""

from __future__ import annotations

import functools
import os
import random
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.support import resume
from tests.support.ranks import on_ranks, outcomes
from tests.support.zygote import GRACE_S
from tp_plugin.weights.whole import LATEST, examine

WORLD, TP = 4, 2
OPTIONS = {"family": "Llama", "heads": (4, 2), "tied": False, "vocab_size": 20_000}  # large enough to take a while


def save_and_be_killed(folder: str, victim: int, moment: float, tag: str | None) -> None:
    """A whole checkpoint; then another, in which rank ``victim`` is killed at ``moment`` of the time it takes."""
    engine = resume.engine_of(TP, 1, **OPTIONS)
    resume.train(engine, TP, (0,), "Llama")
    start = time.monotonic()
    engine.save_checkpoint(folder, tag)
    seconds = time.monotonic() - start
    resume.train(engine, TP, (1,), "Llama")
    Path(folder, f"steps-{dist.get_rank()}").write_text(str(engine.global_steps))
    dist.barrier()
    if dist.get_rank() == victim:
        threading.Timer(moment * seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    engine.save_checkpoint(folder, tag)
    for _ in range(1000):  # the victim was faster than expected: the next steps find it dead
        dist.barrier()
        time.sleep(0.01)


def load_each(folders: list[str]) -> list[int]:
    """Steps of the checkpoint that an ordinary load finds in each."""
    steps = []
    for folder in folders:
        engine = resume.engine_of(TP, 1, **OPTIONS)
        path, _ = engine.load_checkpoint(folder)
        assert path is not None
        steps.append(engine.global_steps)
    return steps


@functools.cache
def killed(count: int) -> list[dict]:
    """``count`` launches, each with its victim and moment; one more launch loads what is left of all of them."""
    chance = random.Random(count)
    root = tempfile.mkdtemp()
    runs = []
    for index in range(count):
        folder = Path(root, str(index))
        folder.mkdir()
        victim, moment = chance.randrange(WORLD), chance.uniform(0.0, 1.1)
        tag = "again" if index % 2 else None  # the same name twice: what is replaced must stay whole as well
        start = time.monotonic()
        found = outcomes(WORLD, save_and_be_killed, str(folder), victim, moment, tag, timeout_s=120)
        runs.append({"folder": folder, "victim": victim, "found": found, "seconds": time.monotonic() - start})
    loaded = on_ranks(2, load_each, [str(run["folder"]) for run in runs], timeout_s=300)[0]
    return [run | {"loaded": steps} for run, steps in zip(runs, loaded, strict=True)]


def holds(run: dict) -> None:
    victim = run["found"][run["victim"]]
    assert victim["kind"] == "Crash", f"the victim was not killed: {victim}"
    for rank, outcome in enumerate(run["found"]):
        assert not outcome["ok"], f"rank {rank} did not notice"
        assert outcome["kind"] != "Hang", f"rank {rank} waited for more than {GRACE_S} s:\n{outcome['log'][-3000:]}"
    assert run["loaded"] in (1, 2)
    named = (run["folder"] / LATEST).read_text()
    assert examine(run["folder"] / named) is None


@pytest.mark.parametrize("index", range(3))
def test_a_killed_rank_ruins_nothing(index):
    holds(killed(3)[index])


@pytest.mark.slow
@pytest.mark.parametrize("index", range(20))
def test_a_rank_killed_at_any_moment_ruins_nothing(index):
    holds(killed(20)[index])
