"""Accelerate with our slot: samples counted once, full state dicts, DeepSpeed on CPU, refusals before training
and at the first step.

Every patch asks :func:`tp_plugin.integrations.accelerate.degree.tp_size` first and is the original where it is 1.
Exceptions: ``rng_state`` asks whether the topology has changed, and the recipes' tripwire is always read.
"""

from tp_plugin.integrations.features import ACCELERATE, CPU_TRAINING
from tp_plugin.integrations.room import Room

ROOM = Room(
    __name__,
    {
        "gather": ACCELERATE,
        "data_parallel": ACCELERATE,
        "cpu": CPU_TRAINING,
        "rng_state": ACCELERATE,
        "steps": ACCELERATE,
        "unsupported": ACCELERATE,
    },
)
