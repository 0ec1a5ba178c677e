"""DeepSpeed: its AutoTP slot, its gradient norm, its exports, and what does not combine."""

from tp_plugin.integrations.deepspeed.slot import check_contracts, install, uninstall

__all__ = ["check_contracts", "install", "uninstall"]
