"""axolotl with our slot: what its processes do by rank 0 alone.

axolotl is optional and slow to import, so its modules are patched when it imports them.
"""

from tp_plugin.integrations.features import AXOLOTL
from tp_plugin.integrations.room import Room

ROOM = Room(__name__, {"saving": AXOLOTL}, waits=True)
