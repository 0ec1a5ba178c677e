"""Fork a few ranks with a gloo group from this process, and always end them.

They are forked, as workers of a DataLoader are, so they need not import what this process has imported. They
communicate over the loopback interface. They end with their parent, at the time limit, or soon after one of them fails.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tp_plugin.errors import TensorParallelError

GRACE_S = 3.0
"""Seconds that the other ranks may run on after one has failed."""


class Launch:
    """``world`` ranks that call ``function(*args)`` beside this process.

    Args:
        world: number of ranks.
        function: any callable; it is not pickled, since the ranks are forks.
        timeout_s: the ranks are killed after this time.
    """

    def __init__(self, world: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> None:
        if dist.is_initialized():
            raise TensorParallelError("ranks cannot be forked from a process that has a process group already.")
        context = multiprocessing.get_context("fork")
        self._folder = tempfile.TemporaryDirectory()
        self._deadline = time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._ranks: list[tuple[Any, Connection]] = []
        self._found: dict[int, tuple[str, Any]] = {}
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(rank, world, self._folder.name, os.getpid(), theirs, function, args), daemon=True
            )
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def done(self) -> bool:
        """Return True once every rank has ended; kills those over their time."""
        for rank, (process, pipe) in enumerate(self._ranks):
            if rank not in self._found and (pipe.poll() or not process.is_alive()):
                try:
                    self._found[rank] = pipe.recv()
                except (EOFError, OSError):
                    process.join(0.2)
                    self._found[rank] = "died", f"a rank died with exit code {process.exitcode}\n{self._log(rank)}"
                if self._found[rank][0] != "value":
                    self._deadline = min(self._deadline, time.monotonic() + GRACE_S)
        if len(self._found) < len(self._ranks):
            if time.monotonic() < self._deadline:
                return False
            for rank, (process, _) in enumerate(self._ranks):
                if rank not in self._found:
                    process.kill()
                    self._found[rank] = "hung", f"no answer within {self._timeout_s:.0f} s"
        self._end()
        return True

    def outcomes(self) -> list[tuple[str, Any]]:
        """Wait for all; per rank ("value", its return value) or ("error" | "died" | "hung", text)."""
        while not self.done():
            time.sleep(0.01)
        return [self._found[rank] for rank in range(len(self._ranks))]

    def _log(self, rank: int) -> str:
        file = Path(self._folder.name, f"{rank}.log")
        return file.read_text(errors="replace")[-2000:] if file.exists() else ""

    def _end(self) -> None:
        for process, pipe in self._ranks:
            process.join(2.0)
            if process.is_alive():
                process.kill()
                process.join()
            pipe.close()
        self._folder.cleanup()


def on_ranks(world: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Call ``function`` on ``world`` forked ranks; returns each rank's value.

    Raises:
        TensorParallelError: a rank failed, died or hung; the message ends with its traceback.
    """
    outcomes = Launch(world, function, *args, timeout_s=timeout_s).outcomes()
    order = ("error", "died", "hung")
    failed = sorted((order.index(kind), text) for kind, text in outcomes if kind != "value")
    if failed:
        raise TensorParallelError(f"a rank failed: {failed[0][1]}")
    return [value for _, value in outcomes]


def _rank(
    rank: int, world: int, folder: str, parent: int, pipe: Connection, function: Callable[..., Any], args: tuple
) -> None:
    die_with_parent(parent)
    redirect_output(f"{folder}/{rank}.log")
    torch.set_num_threads(1)  # a forked child cannot use its parent's threads
    for name in ("lo", "lo0"):  # no traffic leaves this machine, and no host name need resolve
        if os.path.exists(f"/sys/class/net/{name}"):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            break
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
        outcome = "value", function(*args)
        dist.barrier()
    except BaseException:
        outcome = "error", traceback.format_exc()
    pipe.send(outcome)
    pipe.close()
    os._exit(0 if outcome[0] == "value" else 1)


def redirect_output(file: str) -> None:
    """Append stdout and stderr of this process, and of its libraries, to ``file``."""
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def die_with_parent(parent: int) -> None:
    """Have the kernel end this process when its parent ends, even when that is killed (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
