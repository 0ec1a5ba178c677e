"""sentence-transformers with our slot: what its losses gather or run often, what its trainers optimise and load,
and what saving runs on rank 0 alone.

It is optional and slow to import, so its modules are patched when the script imports them.
"""

from tp_plugin.integrations.features import (
    CACHED_LOSSES,
    GATHERED_NEGATIVES,
    MODEL_CARDS,
    SENTENCE_SAVING,
    SENTENCE_TRAINERS,
)
from tp_plugin.integrations.room import Room

ROOM = Room(
    __name__,
    {
        "gather": GATHERED_NEGATIVES,
        "cached": CACHED_LOSSES,
        "trainer": SENTENCE_TRAINERS,
        "saving": SENTENCE_SAVING,
        "model_card": MODEL_CARDS,
    },
    waits=True,
)
