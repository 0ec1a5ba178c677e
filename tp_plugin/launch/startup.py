"""``TP_PLUGIN=1 COMMAND``: tp_plugin in any command that starts Python, its children included.

The wheel puts ``tp_plugin_startup.pth`` beside the package. Python runs its line at every start; where ``TP_PLUGIN`` is
not set, that costs a look into the environment. Else :func:`wait` waits until the program has imported what it trains
with, and registers.
"""

from __future__ import annotations

import multiprocessing
import os
import sys

from tp_plugin.integrations.import_hooks import BetweenImports, waiting

LIBRARIES = ("deepspeed", "transformers", "accelerate", "peft", "trl", "tp_plugin")
"""A package whose import is under way lacks names; ours imports the others amid its own."""
_TRAINERS = ("deepspeed", "transformers.trainer")


def wait() -> None:
    """Register when the libraries of a training have been imported."""
    if waiting():
        return  # in a virtual environment Python reads the line twice
    ranks = ("accelerate",) if "RANK" in os.environ else ()  # a launcher imports accelerate, too
    BetweenImports((*_TRAINERS, *ranks), LIBRARIES, _register).install()


def _register() -> None:
    from tp_plugin.integrations.environment import asked

    if not asked():
        return
    import tp_plugin
    from tp_plugin import log
    from tp_plugin.errors import TensorParallelError
    from tp_plugin.integrations.environment import ASKED, DEGREE, degree_asked
    from tp_plugin.launch.run import start_alike

    try:
        tp_plugin.register()
        degree = degree_asked()
    except TensorParallelError as refused:
        raise SystemExit(f"tp_plugin: {refused}") from refused
    if multiprocessing.parent_process() is None:  # a worker that was spawned has a state of its own
        start_alike(sys.argv[1:])
    if os.environ.get("RANK") == "0":
        which = f"{DEGREE}={degree} ranks" if degree else "tensor_parallel.autotp_size ranks of the DeepSpeed config"
        log.info(f"registered by {ASKED}={os.environ[ASKED]}: models are sharded over {which}")


def execute(command: list[str], degree: int | None) -> int:
    """Replace this process by ``command`` with the variables set; returns 2 where there is no such command."""
    from tp_plugin.integrations.environment import ASKED, DEGREE

    os.environ |= {ASKED: "1"} | ({} if degree is None else {DEGREE: str(degree)})
    why = "there is none"
    if command:
        try:
            os.execvp(command[0], command)
        except OSError as failure:
            why = f"cannot start {command[0]!r}: {failure.strerror}"
    print(f"tp-plugin exec: name a command and its arguments ({why}).", file=sys.stderr)
    return 2
