"""The warm parent that ranks are forked from: torch, DeepSpeed and transformers are imported once, not once a rank.

Started by ``tests.support.ranks``; speaks pickles over the socket whose file descriptor is its argument.
"""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import pkgutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

from tp_plugin.model_check.fork_server import die_with_parent, redirect_output

WARM = (  # what nearly every test uses; torch._dynamo alone takes seconds and is wanted by gradient checkpointing
    "pytest",
    "accelerate",
    "deepspeed",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imported with the first engine; decorates with torch.compile
    "torch._dynamo",
    "torch.distributed",
    "transformers",
    "transformers.trainer",
    *(f"transformers.models.{f}.modeling_{f}" for f in ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "granite")),
    "tp_plugin.api",
)
GRACE_S = 30.0  # how long ranks may go on after one of them has failed before they count as hung


def serve(connection: Connection) -> None:
    die_with_parent(os.getppid())
    for name in WARM:
        importlib.import_module(name)
    _import_package()
    _let_float16_run()
    gc.collect()
    gc.freeze()  # a rank's collector would walk, and copy, every object of these libraries
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send_bytes(pickle.dumps(launch(**job)))  # plain pickles: send() would share tensors by descriptor


def _import_package() -> None:
    """Import what ``register()`` would import in every rank again; importing changes no library."""
    package = importlib.import_module("tp_plugin.integrations")
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(found.name)


def _let_float16_run() -> None:
    """Tell DeepSpeed that this CPU computes in float16.

    It asks for AVX512-FP16 and refuses the dtype elsewhere. PyTorch's own kernels compute it on every CPU.
    """
    accelerator = importlib.import_module("deepspeed.accelerator.cpu_accelerator").CPU_Accelerator
    accelerator.is_fp16_supported = lambda self: True


def launch(
    world: int, module: str, function: str, args: tuple, kwargs: dict, timeout_s: float, env: dict, group: bool
) -> list[dict]:
    """Fork ``world`` ranks that call ``module.function``; one outcome a rank: ok, value or error, log."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        pids, parent = {}, os.getpid()
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                _child(parent, rank, world, port, folder, module, function, args, kwargs, env, group)
            pids[pid] = rank
        hung = _wait(set(pids), timeout_s)
        return [_outcome(folder, rank, rank in {pids[pid] for pid in hung}) for rank in range(world)]


def _child(parent, rank, world, port, folder, module, function, args, kwargs, env, group) -> None:
    code = 1
    try:
        die_with_parent(parent)
        redirect_output(f"{folder}/{rank}.log")
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **env,
        )  # fmt: skip
        import torch.distributed as dist

        if group:
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
