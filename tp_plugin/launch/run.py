"""Run a user's own training script, unmodified, with our layers and loss in DeepSpeed's AutoTP slot.

accelerate launch --config_file config.yaml -m tp_plugin.run train.py --its --own arguments
deepspeed --num_gpus 8 --module tp_plugin.run train.py --deepspeed_config ds.json
torchrun --nproc_per_node 8 -m tp_plugin.run -m package.train
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tp_plugin.errors import TensorParallelError

USAGE = (
    "usage: python -m tp_plugin.run SCRIPT.py [ARGUMENTS...]   or   python -m tp_plugin.run -m MODULE [ARGUMENTS...]"
)
_OF_LAUNCHERS = ("--local_rank", "--local-rank")


def main(arguments: Sequence[str] | None = None) -> None:
    """Register, then run the script or module that ``arguments`` (default: the command line's) names, as ``__main__``.

    What a launcher puts before the script's name (``--local_rank=N``) is handed on to the script, which would have
    received it without us. Leaves by SystemExit with code 2 when there is nothing to run.
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

    sys.argv = [target, *launcher, *own]
    if as_module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        _look_beside(target)
        runpy.run_path(target, run_name="__main__")


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What the launcher put in front, and the rest."""
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
