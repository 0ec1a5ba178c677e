"""Ranks of our own always end: values, errors, deaths and hangs come back, and no process is left."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tp_plugin.errors import TensorParallelError
from tp_plugin.model_check.fork_server import Launch, on_ranks


def total(start: int) -> tuple[int, float]:
    found = torch.tensor([float(start + dist.get_rank())])
    dist.all_reduce(found)
    return os.getpid(), found.item()


def fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("of rank 1 only")
    dist.barrier()


def hang() -> None:
    time.sleep(60)


def die() -> None:
    if dist.get_rank() == 0:
        os._exit(7)
    dist.barrier()


def ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_values_of_each_rank():
    found = on_ranks(3, total, 10)
    assert [value for _, value in found] == [33.0] * 3
    assert all(ended(pid) for pid, _ in found)


def test_one_that_raises_ends_all_with_its_traceback():
    started = time.monotonic()
    with pytest.raises(TensorParallelError, match="ValueError: of rank 1 only"):
        on_ranks(2, fail_on_one)
    assert time.monotonic() - started < 20


def test_the_time_limit_ends_a_hang():
    launch = Launch(2, hang, timeout_s=2)
    pids = [process.pid for process, _ in launch._ranks]
    assert {kind for kind, _ in launch.outcomes()} == {"hung"}
    assert all(ended(pid) for pid in pids)


def test_a_death_is_told():
    kinds = [kind for kind, _ in Launch(2, die, timeout_s=20).outcomes()]
    assert kinds[0] == "died"
    assert kinds[1] != "value"
