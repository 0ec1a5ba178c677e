"""DeepSpeed: its AutoTP slot, its gradient norm, its exports, its checkpoints, and what does not combine."""

from tp_plugin.integrations.features import CHECKPOINTS, ENGINE_EXPORT, NORMS, SLOT
from tp_plugin.integrations.room import Room

ROOM = Room(
    __name__,
    {
        "slot": SLOT,
        "config": SLOT,
        "process_groups": SLOT,
        "grad_norm": NORMS,
        "export": ENGINE_EXPORT,
        "checkpoint.optimizer_fragments": CHECKPOINTS,
        "checkpoint.engine": CHECKPOINTS,
        "tp_plugin.integrations.zero3": SLOT,
    },
)
