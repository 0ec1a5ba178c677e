"""transformers with our slot: models loaded by slices, the guarded first step, streamed saves, ``generate``.

Trainer counts and reads once for a TP group.
"""

from tp_plugin.integrations.features import GENERATION, LOADING, LOGGED_COUNTS, SAVING, TRAINER
from tp_plugin.integrations.room import Room

ROOM = Room(
    __name__,
    {
        "data_parallel": TRAINER,
        "deepspeed_config": TRAINER,
        "save_plan": SAVING,
        "export": SAVING,
        "from_pretrained": LOADING,
        "generate": GENERATION,
        "guard": TRAINER,
        "parameters": LOGGED_COUNTS,
        "trainer_save": TRAINER,
        "unsupported": TRAINER,
    },
)
