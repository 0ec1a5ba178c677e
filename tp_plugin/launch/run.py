"""Run a user's own training script, unmodified, with tp_plugin registered.

``accelerate launch --config_file config.yaml -m tp_plugin.run train.py --its --own arguments``
``deepspeed --num_gpus 8 --module tp_plugin.run train.py --deepspeed_config ds.json``
``torchrun --nproc_per_node 8 -m tp_plugin.run -m package.train``
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy
import torch

from tp_plugin.errors import TensorParallelError

USAGE = (
    "usage: python -m tp_plugin.run SCRIPT.py [ARGUMENTS...]   or   python -m tp_plugin.run -m MODULE [ARGUMENTS...]"
)
_OF_LAUNCHERS = ("--local_rank", "--local-rank")
_OF_JOB = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID")


def main(arguments: Sequence[str] | None = None) -> None:
    """Register, then run the script or module that ``arguments`` (default: the command line's) names, as ``__main__``.

    Ranks that have to draw alike start with one random state, see :func:`start_alike`.

    Arguments that a launcher puts before the script's name (``--local_rank=N``) are passed to the script. Raises
    SystemExit with code 2 when there is nothing to run.
    """
    launcher, rest = _split(list(sys.argv[1:] if arguments is None else arguments))
    if not rest or rest[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if rest else sys.stderr)
        raise SystemExit(0 if rest else 2)
    as_module = rest[0] == "-m"
    if as_module:
        if len(rest) < 2:
            _refuse("-m needs the name of a module.")
        target, own = rest[1], rest[2:]
        _check_module(target)
    else:
        target, own = rest[0], rest[1:]
        _check_script(target)

    import tp_plugin

    try:
        tp_plugin.register()
    except TensorParallelError as refused:
        raise SystemExit(f"tp_plugin: {refused}") from refused

    start_alike(own)
    sys.argv = [target, *launcher, *own]
    if as_module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        _look_beside(target)
        runpy.run_path(target, run_name="__main__")


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Arguments that the launcher put in front, and the rest."""
    count = 0
    while count < len(arguments) and arguments[count].split("=")[0] in _OF_LAUNCHERS:
        count += 1 if "=" in arguments[count] else 2
    return arguments[:count], arguments[count:]


def _check_script(name: str) -> None:
    path = Path(name)
    if name.startswith("-"):
        _refuse(f"unknown option {name!r} before the script; options of the script go after its name.")
    if not path.exists():
        _refuse(
            f"there is no script {name!r} (looked for {path.absolute()}); give its path from the current directory."
        )
    if path.is_dir() and not (path / "__main__.py").exists():
        _refuse(f"{name!r} is a directory without __main__.py; name the script in it.")


def _check_module(name: str) -> None:
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        found = None
    if found is None:
        _refuse(f"there is no module {name!r} on the path; install it, or start from the directory that contains it.")


def _look_beside(script: str) -> None:
    """Modules beside the script come first, as for ``python script.py``; ``python -m`` has put our directory there."""
    if getattr(sys.flags, "safe_path", False):
        return
    beside = str(Path(script).resolve().parent)
    if sys.path and sys.path[0] in ("", os.getcwd()):
        sys.path[0] = beside
    else:
        sys.path.insert(0, beside)


def _refuse(message: str) -> NoReturn:
    print(f"python -m tp_plugin.run: {message}\n{USAGE}", file=sys.stderr)
    raise SystemExit(2)


def start_alike(arguments: Sequence[str]) -> None:
    """Seed NumPy's and Python's generators alike on all ranks of a job, torch's alike on the ranks of a TP group.

    Ranks of a TP group read the same rows. ``dataset.shuffle()`` without a seed, before a model or a process group
    exists, would give each rank an order of its own.

    A job of one process, or with no ``autotp_size`` above 1 in its DeepSpeed config, is left alone. Where no config is
    known yet, torch's generator is left alone: data-parallel replicas may not share dropout masks.

    Args:
        arguments: the script's own, among which the name of the DeepSpeed config may be.
    """
    world, degree = int(os.environ.get("WORLD_SIZE", "1")), _degree(arguments)
    if world == 1 or degree == 1:
        return
    seed = _seed_of_job(world)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    if degree is not None:
        torch.manual_seed(seed + 1 + int(os.environ.get("RANK", "0")) // degree)


def _degree(arguments: Sequence[str]) -> int | None:
    """``tensor_parallel.autotp_size`` of the DeepSpeed config that the launcher or the command line names."""
    from tp_plugin.integrations.accelerate.degree import degree_in

    named = [os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", ""), *(text.split("=", 1)[-1] for text in arguments)]
    for name in named:
        if not name.endswith(".json"):
            continue
        try:
            config = json.loads(Path(name).read_text())
        except (OSError, ValueError):
            continue
        if isinstance(config, dict) and ("tensor_parallel" in config or "zero_optimization" in config):
            return degree_in(config)
    return None


def _seed_of_job(world: int) -> int:
    """A number that the ranks of one launch share; on one host, another number in every launch."""
    of_job = [os.environ.get(name, "") for name in _OF_JOB]
    if os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "")) == str(world):
        of_job.append(str(os.getppid()))  # the launcher's, which started all of them
    return int.from_bytes(hashlib.sha256(" ".join(of_job).encode()).digest()[:6], "big")
