"""sentence-transformers with our slot: what its losses gather, run backward often or hold beside the model, and
what its saving runs on rank 0 alone.

It is optional and slow to import, so its modules are patched when the script imports them.
"""

from tp_plugin.integrations.features import CACHED_LOSSES, GATHERED_NEGATIVES, GUIDED_LOSSES, MODEL_CARDS
from tp_plugin.integrations.room import Room

ROOM = Room(
    __name__,
    {"gather": GATHERED_NEGATIVES, "cached": CACHED_LOSSES, "guide": GUIDED_LOSSES, "model_card": MODEL_CARDS},
    waits=True,
)
