"""DeepSpeed on machines without an accelerator, without a compiler.

There DeepSpeed compiles a shared-memory collective when communication starts: half a minute, a C++ compiler, and a
lock file that makes every later start wait for ever once a compiling process was killed. Plain gloo does all that
is needed on such machines, which are for trying things out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from deepspeed.accelerator import get_accelerator

from tp_plugin.integrations.contract import Patches, contract

backend = importlib.import_module("deepspeed.comm.torch")  # as an attribute that name means torch itself


def install(patches: Patches) -> None:
    """Leave the compiled collectives out where there is no accelerator."""
    if get_accelerator().device_name() == "cpu":
        patches.replace(backend, "build_shm_op", _nothing)


def check_contracts() -> None:
    """See :func:`tp_plugin.integrations.deepspeed.slot.check_contracts`."""
    contract(backend, "build_shm_op", [], "on CPU nothing is compiled when communication starts")


def _nothing(_original: Callable[[], object]) -> Callable[[], None]:
    def build_shm_op() -> None:
        return None

    return build_shm_op
