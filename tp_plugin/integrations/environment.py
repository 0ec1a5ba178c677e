"""``TP_PLUGIN`` and ``TP_PLUGIN_DEGREE``: what a command asks of tp_plugin without a change of its program or files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from tp_plugin.errors import TensorParallelError

ASKED, DEGREE = "TP_PLUGIN", "TP_PLUGIN_DEGREE"
_OFF = ("", "0", "false", "no", "off")


def asked() -> bool:
    """Return True if ``TP_PLUGIN`` asks for tp_plugin in this process."""
    return os.environ.get(ASKED, "").lower() not in _OFF


def degree_asked() -> int | None:
    """``TP_PLUGIN_DEGREE``, the degree for programs that offer no key for it; None without it.

    Raises:
        TensorParallelError: the variable is no whole number above 0.
    """
    given = os.environ.get(DEGREE, "")
    if not given or not asked():
        return None
    if not given.isdecimal() or int(given) < 1:
        raise TensorParallelError(f"{DEGREE} must be a whole number above 0, got {given!r}; set it to the degree.")
    return int(given)


def with_degree(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A DeepSpeed config with ``TP_PLUGIN_DEGREE`` where it has no ``tensor_parallel.autotp_size``, else ``config``.

    Raises:
        TensorParallelError: the config has another degree.
    """
    degree, section = degree_asked(), config.get("tensor_parallel") or {}
    if degree is None or not isinstance(section, Mapping):
        return config
    given = section.get("autotp_size")
    if given in (None, 0):
        return {**config, "tensor_parallel": {**section, "autotp_size": degree}}
    if given != degree:
        raise TensorParallelError(
            f"the degree is {given!r} in the DeepSpeed config or tp_model_init, and {DEGREE} is {degree}; remove one."
        )
    return config


def refuse_no_degree(config: Mapping[str, Any] | None, world: int) -> None:
    """Raise TensorParallelError if ``TP_PLUGIN`` is set and nothing would be sharded, unless a degree of 1 is given.

    Args:
        config: the DeepSpeed config of the job; None without DeepSpeed.
        world: number of its processes.
    """
    if not asked() or world == 1 or (config is not None and (config.get("tensor_parallel") or {}).get("autotp_size")):
        return
    why, remedy = "the DeepSpeed config has no tensor_parallel.autotp_size", f"set {DEGREE}=N, or add the key"
    if config is None:
        why, remedy = "the job runs without DeepSpeed, whose engine is sharded", "give it a DeepSpeed config"
    raise TensorParallelError(f"{ASKED} is set and {why}, so nothing would be sharded: {remedy}, or unset {ASKED}.")
