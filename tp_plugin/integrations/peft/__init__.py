"""PEFT: adapters around the modules of a sharded model, put there before sharding or after."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from tp_plugin.integrations.contract import Patches

_PATCHES = Patches()


def install() -> None:
    """Let models with adapters be sharded, and sharded models be adapted; nothing where PEFT is not installed.

    Calling it again does nothing.

    Raises:
        TensorParallelError: a name we rely on has moved.
    """
    if importlib.util.find_spec("peft") is None or _PATCHES:
        return
    from tp_plugin.integrations.peft import counts, late, library, load, save
    from tp_plugin.sharding import adapters

    check_contracts()
    counts.install(_PATCHES)
    late.install(_PATCHES)
    load.install(_PATCHES)
    save.install(_PATCHES)
    adapters.introduce(library.LIBRARY)


def uninstall() -> None:
    """Take our patches off again. Models that are sharded stay so."""
    _PATCHES.undo()


def check_contracts() -> None:
    """Every name of PEFT this package touches, checked. Raises TensorParallelError naming what moved."""
    from tp_plugin.integrations.peft import counts, late, library, load, save

    for part in (counts, library, late, load, save):
        part.check_contracts()


def is_adapted(model_or_engine: Any) -> bool:
    """Whether this is a ``PeftModel``, or an engine around one."""
    if "peft" not in sys.modules:
        return False
    from peft import PeftModel

    from tp_plugin.weights.gather import unwrapped

    return isinstance(unwrapped(model_or_engine), PeftModel)


def save_adapters(model_or_engine: Any, directory: str | Path, **options: Any) -> None:
    """See :func:`tp_plugin.integrations.peft.save.save_adapters`."""
    from tp_plugin.integrations.peft import save

    save.save_adapters(model_or_engine, directory, **options)


__all__ = ["check_contracts", "install", "is_adapted", "save_adapters", "uninstall"]
