"""PyTorch's and safetensors' functions that write, copy, join and measure weights, without knowledge of shards.

Also the making of a process group, in whose store ranks leave a note.
"""

from tp_plugin.integrations.features import PRESENCE, WEIGHTS
from tp_plugin.integrations.room import Room

ROOM = Room(__name__, {"collectives": WEIGHTS, "state_dicts": WEIGHTS, "parameters": WEIGHTS, "presence": PRESENCE})
