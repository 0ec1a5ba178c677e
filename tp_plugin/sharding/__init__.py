"""Sharding a model in place, and what is known of it afterwards."""

from tp_plugin.sharding.shard import shard_in_place
from tp_plugin.sharding.state import Sharding, root_of, sharded_models, state_of

__all__ = ["Sharding", "root_of", "shard_in_place", "sharded_models", "state_of"]
