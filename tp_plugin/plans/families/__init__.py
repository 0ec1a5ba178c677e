"""Families whose layout is peculiar or that have no plan of HF's, each a small table of rules."""

from tp_plugin.plans.families import decoders, encoders, moe, packed

__all__ = ["decoders", "encoders", "moe", "packed"]
