"""The end of a process: gloo's threads drop their last tensors before the interpreter is torn down."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.launching import ENVIRONMENT

# The thread of the last collective drops its tensor, for which it needs the interpreter; the loop keeps it from it.
PROCESSES = """
import os, sys
import torch, torch.distributed as dist
import {module}

def collective(kept):
    global group
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    sys.setswitchinterval(100)
    dist.all_reduce(torch.ones(4), async_op=True)
    sum(range(3_000_000))
    if not kept:
        dist.destroy_process_group()

for number in range(2):
    child = os.fork()
    if not child:
        collective(number % 2)
        break
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.mark.parametrize("module", ["tp_plugin.mesh", "tp_plugin.loss"])
def test_a_process_that_leaves_right_after_a_collective_is_not_aborted(module):
    done = subprocess.run(
        [sys.executable, "-c", PROCESSES.replace("{module}", module)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["0"] * 2, done.stderr
