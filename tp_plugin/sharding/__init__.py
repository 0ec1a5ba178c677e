"""Sharding a model in place, and what is known of it afterwards."""

from tp_plugin.sharding.shard import shard_in_place
from tp_plugin.sharding.state import Sharding, state_of

__all__ = ["Sharding", "shard_in_place", "state_of"]
