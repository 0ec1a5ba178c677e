"""Random states after a change of shape: of each data-parallel rank its own, whatever Trainer files beside them."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer

from tests.support import resume
from tests.support.ranks import on_ranks
from tp_plugin.weights import rng_state

ROOT = tempfile.TemporaryDirectory()


def trainer_of(engine: Any) -> Any:
    """What Trainer's two methods for random states look at."""
    rank, world = dist.get_rank(), dist.get_world_size()
    args = SimpleNamespace(process_index=rank, world_size=world, parallel_mode=None, should_save=rank == 0)
    return SimpleNamespace(args=args, model=engine.module)


def save(folder: str) -> tuple[float, list[float]]:
    """By tp 2 x dp 2, in Trainer's order; what each rank draws next, and after it was loaded on the same shape."""
    engine = resume.engine_of(2, 1)
    torch.manual_seed(7 + dist.get_rank() // 2)
    engine.save_checkpoint(folder)
    Trainer._save_rng_state(trainer_of(engine), folder)
    drawn = torch.rand(()).item()
    dist.barrier()
    return drawn, load(folder, 2)


def load(folder: str, tp: int) -> list[float]:
    """What each rank draws next after each of two loads, Trainer's epochs may do one each."""
    engine = resume.engine_of(tp, 1, seed=1, extra={"gradient_accumulation_steps": 1})
    engine.load_checkpoint(folder)
    draws = []
    for _ in range(2):
        torch.manual_seed(1000 + dist.get_rank())
        Trainer._load_rng_state(trainer_of(engine), folder)
        draws.append(torch.rand(()).item())
    return draws


@functools.cache
def saved() -> list[tuple[float, list[float]]]:
    return on_ranks(4, save, ROOT.name)


def test_each_data_parallel_rank_draws_its_own():
    one, twin, other, other_twin = (drawn for drawn, _ in saved())
    assert one == twin != other == other_twin
    first, second, third, fourth = on_ranks(4, load, ROOT.name, 1)
    assert [first, second] == [[one] * 2, [other] * 2]
    assert len({one, other, third[0], fourth[0]}) == 4, "ranks that the checkpoint has no states of part ways"
    assert third[0] == third[1]


def test_the_same_shape_keeps_trainers_files():
    assert all(loaded == [drawn] * 2 for drawn, loaded in saved())


def test_only_of_the_checkpoint_that_was_loaded():
    model = torch.nn.Linear(2, 2)
    before = rng_state.generators()
    try:
        torch.manual_seed(3)
        rng_state.remember(model, Path("/a/checkpoint-2/global_step2"))
        expected = torch.rand(())
        for folder, restored in ((None, True), (Path("/a/checkpoint-2"), True), (Path("/a/checkpoint-4"), False)):
            torch.manual_seed(4)
            rng_state.restore_again(model, folder)
            assert torch.equal(torch.rand(()), expected) is restored
        rng_state.forget(model)
        torch.manual_seed(4)
        rng_state.restore_again(model)
        assert torch.rand(()) != expected
    finally:
        rng_state.set_generators(before.get)
