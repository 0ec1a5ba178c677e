"""Weights in and out of a sharded model."""

from tp_plugin.weights.gather import full_state_dict
from tp_plugin.weights.save import save_pretrained

__all__ = ["full_state_dict", "save_pretrained"]
