"""Run a function on several real processes with a real gloo group.

    losses = on_ranks(4, train, stage=2)           # every rank's return value; fails with the rank's own log
    errors = errors_on_ranks(2, broken_setup)      # every rank's message; fails if one does not raise, or hangs

The function must be importable by name (module level) and its values picklable. Inside it the default process group
exists (none for one rank), ``RANK`` and ``WORLD_SIZE`` are set, and stdout goes to the rank's log.
"""

from __future__ import annotations

import atexit
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_ZYGOTE: tuple[subprocess.Popen, Connection] | None = None
forbidden = False
"""Whether launching ranks is an error: set while only tests marked unit run."""


def _zygote() -> Connection:
    global _ZYGOTE
    if forbidden:
        raise RuntimeError("a test marked unit launches ranks; teach tests/support/markers.py to see how")
    if "TEST_RANK" in os.environ:
        raise RuntimeError("a rank cannot launch ranks; keep calls of on_ranks out of module level")
    if _ZYGOTE is None or _ZYGOTE[0].poll() is not None:
        ours, theirs = socket.socketpair()
        os.set_inheritable(theirs.fileno(), True)
        env = os.environ | {
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "TEST_RANK": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fork_server", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            cwd=ROOT,
            env=env,
        )
        theirs.close()
        _ZYGOTE = process, Connection(ours.detach())
        atexit.register(process.kill)
    return _ZYGOTE[1]


def outcomes(
    world: int,
    function: Callable,
    *args: Any,
    timeout_s: float = 300,
    env: dict[str, str] | None = None,
    group: bool | None = None,
    **kwargs: Any,
) -> list[dict]:
    """One dict a rank: ``ok``, ``value`` or ``error`` and ``kind``, and ``log``.

    ``group``: whether the default process group is made first; None makes it of several ranks only.
    """
    connection = _zygote()
    connection.send(
        {
            "world": world,
            "module": function.__module__,
            "function": function.__qualname__,
            "args": args,
            "kwargs": kwargs,
            "timeout_s": timeout_s,
            "env": env or {},
            "group": world > 1 if group is None else group,
        }
    )
    return pickle.loads(connection.recv_bytes())


def on_ranks(world: int, function: Callable, *args: Any, **kwargs: Any) -> list[Any]:
    """The return value of ``function(*args, **kwargs)`` on each of ``world`` ranks.

    ``timeout_s``, ``env`` and ``group`` are the harness's own, see :func:`outcomes`.
    """
    found = outcomes(world, function, *args, **kwargs)
    failed = [(rank, o) for rank, o in enumerate(found) if not o["ok"]]
    if failed:
        # the rank that raised first is more telling than those that lost their peer or hung behind it
        rank, worst = min(failed, key=lambda item: (_is_echo(item[1]), item[0]))
        raise AssertionError(f"rank {rank} of {world}: {worst['kind']}: {worst['error']}\n{worst['log'][-6000:]}")
    return [o["value"] for o in found]


def _is_echo(outcome: dict) -> bool:
    return outcome["kind"] in ("Hang", "Crash", "DistBackendError") or "gloo/transport" in outcome["error"]


def errors_on_ranks(world: int, function: Callable, *args: Any, **kwargs: Any) -> list[str]:
    """The message each rank raised. Fails unless every rank raised by itself, none hanging or killed."""
    found = outcomes(world, function, *args, **kwargs)
    for rank, outcome in enumerate(found):
        if outcome["ok"] or outcome["kind"] in ("Hang", "Crash"):
            state = "raised nothing" if outcome["ok"] else outcome["error"]
            raise AssertionError(f"rank {rank} of {world} {state}\n{outcome['log'][-4000:]}")
    return [outcome["error"] for outcome in found]
