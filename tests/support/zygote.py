"""The warm parent that ranks are forked from: torch, DeepSpeed and transformers are imported once, not once a rank.

Started by ``tests.support.ranks``; speaks pickles over the socket whose file descriptor is its argument.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

WARM = (  # what nearly every test uses; torch._dynamo alone takes seconds and is wanted by gradient checkpointing
    "accelerate",
    "deepspeed",
    "deepspeed.runtime.zero.stage3",
    "torch._dynamo",
    "torch.distributed",
    "transformers",
    "transformers.trainer",
    *(f"transformers.models.{f}.modeling_{f}" for f in ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "granite")),
    "tp_plugin",
    "tp_plugin.integrations.deepspeed",
)
GRACE_S = 30.0  # how long ranks may go on after one of them has failed before they count as hung


def die_with_parent() -> None:
    """Have the kernel end this process when its parent ends, however that was killed: orphans would run on."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def serve(connection: Connection) -> None:
    die_with_parent()
    for name in WARM:
        importlib.import_module(name)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send_bytes(pickle.dumps(launch(**job)))  # plain pickles: send() would share tensors by descriptor


def launch(
    world: int, module: str, function: str, args: tuple, kwargs: dict, timeout_s: float, env: dict
) -> list[dict]:
    """Fork ``world`` ranks that call ``module.function``; one outcome a rank: ok, value or error, log."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        pids = {}
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                _child(rank, world, port, folder, module, function, args, kwargs, env)
            pids[pid] = rank
        hung = _wait(set(pids), timeout_s)
        return [_outcome(folder, rank, rank in {pids[pid] for pid in hung}) for rank in range(world)]


def _child(rank, world, port, folder, module, function, args, kwargs, env) -> None:
    code = 1
    try:
        die_with_parent()
        log = os.open(f"{folder}/{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **env,
        )  # fmt: skip
        import torch.distributed as dist

        if world > 1 or "FORCE_GROUP" in env:
            dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        call = importlib.import_module(module)
        for part in function.split("."):
            call = getattr(call, part)
        outcome = {"ok": True, "value": call(*args, **kwargs)}
        if dist.is_initialized():
            dist.barrier()
        code = 0
    except BaseException as failure:
        traceback.print_exc()
        outcome = {"ok": False, "error": str(failure), "kind": type(failure).__name__}
    with open(f"{folder}/{rank}.part", "wb") as file:
        pickle.dump(outcome, file)
    os.rename(f"{folder}/{rank}.part", f"{folder}/{rank}.pickle")
    sys.stdout.flush()
    os._exit(code)


def _wait(pids: set[int], timeout_s: float) -> set[int]:
    """Reap all; after a failure or the time limit kill what is left and return it."""
    deadline, failed = time.monotonic() + timeout_s, False
    while pids:
        for pid in list(pids):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                pids.remove(pid)
                if status and not failed:
                    failed, deadline = True, min(deadline, time.monotonic() + GRACE_S)
        if pids and time.monotonic() > deadline:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            return pids
        time.sleep(0.02)
    return set()


def _outcome(folder: str, rank: int, hung: bool) -> dict:
    log_file, outcome = Path(folder, f"{rank}.log"), Path(folder, f"{rank}.pickle")
    log = log_file.read_text(errors="replace") if log_file.exists() else ""
    if outcome.exists():
        return pickle.loads(outcome.read_bytes()) | {"log": log}
    return {"ok": False, "error": "hung" if hung else "died", "kind": "Hang" if hung else "Crash", "log": log}


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
