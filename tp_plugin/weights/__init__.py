"""Weights in and out of a sharded model."""

from tp_plugin.weights.gather import full_state_dict

__all__ = ["full_state_dict"]
