"""sentence-transformers with our slot: what its losses collect over ranks, run backward often, or hold beside the model.

It is optional and slow to import, so its modules are patched when the script imports them.
"""

from tp_plugin.integrations.features import CACHED_LOSSES, GATHERED_NEGATIVES, GUIDED_LOSSES
from tp_plugin.integrations.room import Room

ROOM = Room(
    __name__, {"gather": GATHERED_NEGATIVES, "cached": CACHED_LOSSES, "guide": GUIDED_LOSSES}, waits=True
)
