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
from typing import Any

import pytest
import torch.distributed as dist

from tests.support import resume
from tests.support.fork_server import GRACE_S
from tests.support.ranks import on_ranks, outcomes
from tp_plugin.integrations.checkpoint_folders import LATEST
from tp_plugin.integrations.deepspeed.checkpoint import engine as checkpoint
from tp_plugin.weights.atomic import MARK
from tp_plugin.weights.fragments import damage_of
from tp_plugin.weights.safetensors_file import SafetensorsFile

WORLD, TP = 4, 2
OPTIONS = {"family": "Llama", "heads": (4, 2), "tied": False, "vocab_size": 20_000}  # large enough to take a while


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_when_writing() -> None:
    """Half of the next large tensor gets into this rank's file."""
    whole = SafetensorsFile._put

    def half(self: SafetensorsFile, data: Any, at: int) -> None:
        if len(data) >= 1 << 16:
            whole(self, data[: len(data) // 2], at)
            die()
        whole(self, data, at)

    SafetensorsFile._put = half


def die_when_swapped() -> None:
    """The directory is in its place, and ``latest`` is not written yet."""
    whole = checkpoint.write_file

    def never(path: Path, content: bytes) -> None:
        if path.name == LATEST:
            die()
        whole(path, content)

    checkpoint.write_file = never


PLACES = {"writing": die_when_writing, "swapped": die_when_swapped}


def save_and_be_killed(folder: str, victim: int, moment: float | str, tag: str | None) -> None:
    """A whole checkpoint; then another, in which rank ``victim`` is killed.

    ``moment``: one of :data:`PLACES`, or after that many times what the first save took.
    """
    engine = resume.engine_of(TP, 1, **OPTIONS)
    resume.train(engine, TP, (0,), "Llama")
    start = time.monotonic()
    engine.save_checkpoint(folder, tag)
    seconds = time.monotonic() - start
    resume.train(engine, TP, (1,), "Llama")
    dist.barrier()
    if dist.get_rank() == victim and isinstance(moment, str):
        PLACES[moment]()
    elif dist.get_rank() == victim:
        threading.Timer(moment * seconds, die).start()
    engine.save_checkpoint(folder, tag)
    Path(folder, f"through-{dist.get_rank()}").touch()
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


def launched(victim: int, moment: float | str, tag: str | None) -> dict:
    folder = Path(tempfile.mkdtemp())
    start = time.monotonic()
    found = outcomes(WORLD, save_and_be_killed, str(folder), victim, moment, tag, timeout_s=120)
    return {
        "folder": folder,
        "victim": victim,
        "found": found,
        "seconds": time.monotonic() - start,
        "interrupted": not (folder / f"through-{victim}").exists(),
    }


@functools.cache
def killed(plans: tuple[tuple[int, float | str, str | None], ...]) -> list[dict]:
    """A launch for each (victim, moment, tag); one more launch loads what is left of all of them."""
    runs = [launched(*plan) for plan in plans]
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
    assert damage_of(run["folder"] / named) is None


# the first rank writes the manifest, renames and writes `latest`; the same name twice: there is something to lose
PLANNED = {
    "the first rank, writing": (0, "writing", "again"),
    "the first rank, swapped": (0, "swapped", "again"),
    "another rank, writing": (2, "writing", "again"),
}


@pytest.mark.parametrize("name", PLANNED)
def test_a_killed_rank_ruins_nothing(name):
    run = killed(tuple(PLANNED.values()))[list(PLANNED).index(name)]
    holds(run)
    assert run["interrupted"], "the save was through before the kill"
    assert run["loaded"] == (2 if "swapped" in name else 1)
    left = [path.name for path in run["folder"].iterdir() if path.name.startswith(MARK)]
    assert len(left) == (0 if "swapped" in name else 1), "the kill came at another moment"


def plans(count: int) -> tuple[tuple[int, float, str | None], ...]:
    """Every rank is the victim equally often, of saves under a new name and under that of what is there."""
    chance = random.Random(count)
    return tuple(
        (index % WORLD, chance.uniform(0.0, 1.1), "again" if index // WORLD % 2 == 0 else None)
        for index in range(count)
    )


@pytest.mark.slow
@pytest.mark.parametrize("index", range(20))
def test_a_rank_killed_at_any_moment_ruins_nothing(index):
    holds(killed(plans(20))[index])


@pytest.mark.slow
def test_saves_were_interrupted():
    interrupted = [run["victim"] for run in killed(plans(20)) if run["interrupted"]]
    assert 0 in interrupted
    assert len(interrupted) >= 5, interrupted
