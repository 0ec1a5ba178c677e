"""PEFT: adapters in a sharded model, put in before sharding or after."""

import sys
from pathlib import Path
from typing import Any

from tp_plugin.integrations.features import ADAPTERS, SAVED_ADAPTERS
from tp_plugin.integrations.room import Room


def _refuse_adapters() -> None:
    from tp_plugin.integrations.peft import refused

    refused.introduce()


ROOM = Room(
    __name__,
    {"backend": ADAPTERS, "inject": ADAPTERS, "load": SAVED_ADAPTERS, "save": SAVED_ADAPTERS},
    otherwise=_refuse_adapters,
)


def is_adapted(model_or_engine: Any) -> bool:
    """Tell if this is a ``PeftModel``, or an engine around one."""
    if "peft" not in sys.modules:
        return False
    from peft import PeftModel

    from tp_plugin.weights.gather import unwrapped

    return isinstance(unwrapped(model_or_engine), PeftModel)


def save_adapters(model_or_engine: Any, directory: str | Path, **options: Any) -> None:
    """See :func:`tp_plugin.integrations.peft.save.save_adapters`."""
    from tp_plugin.integrations.peft import save

    save.save_adapters(model_or_engine, directory, **options)


__all__ = ["ROOM", "is_adapted", "save_adapters"]
