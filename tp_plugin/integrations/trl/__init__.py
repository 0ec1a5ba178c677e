"""TRL with our slot: its fused language-model head over a sharded vocabulary, and untested trainers refused.

TRL is optional and slow to import, so its modules are patched when the script imports them.
"""

from tp_plugin.integrations.features import FUSED_HEAD, TRL_TRAINERS
from tp_plugin.integrations.room import Room

ROOM = Room(__name__, {"head": FUSED_HEAD, "sft_loss": FUSED_HEAD, "trainers": TRL_TRAINERS}, waits=True)
