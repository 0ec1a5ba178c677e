"""PyTorch's and safetensors' functions that write, copy, join and measure weights, without knowledge of shards."""

from tp_plugin.integrations.features import WEIGHTS
from tp_plugin.integrations.room import Room

ROOM = Room(__name__, {"collectives": WEIGHTS, "state_dicts": WEIGHTS, "parameters": WEIGHTS})
