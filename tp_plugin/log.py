"""The package's logger, ``tp_plugin``: one line a message, on stderr unless the program has configured logging.

Messages are shown from level INFO on. A handler on this logger or on the root logger takes the place of stderr::

    logging.basicConfig(filename="train.log")                    # to a file, with everything else
    logging.getLogger("tp_plugin").setLevel(logging.WARNING)     # warnings only
"""

from __future__ import annotations

import logging
import os
import sys

import torch.distributed as dist

LOGGER = logging.getLogger("tp_plugin")


def info(message: str, *, rank0_only: bool = True) -> None:
    """Log ``message``; on rank 0 of the world, unless it is about the calling rank."""
    _log(logging.INFO, message, rank0_only)


def warning(message: str, *, rank0_only: bool = True) -> None:
    """As :func:`info`, a message that asks for a decision of the user's."""
    _log(logging.WARNING, message, rank0_only)


def _log(level: int, message: str, rank0_only: bool) -> None:
    if not rank0_only or _rank() == 0:
        LOGGER.log(level, message)


def _rank() -> int:
    """The rank in the world; a launcher says it in ``RANK`` before there is a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))


class _UnlessConfigured(logging.StreamHandler):
    """Writes to ``sys.stderr`` as it is when a message comes; silent where another handler gets the message."""

    def emit(self, record: logging.LogRecord) -> None:
        others = [handler for handler in LOGGER.handlers if handler is not self]
        if not others and not (LOGGER.propagate and logging.getLogger().handlers):
            self.stream = sys.stderr
            super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname}: " if record.levelno > logging.INFO else ""
        return f"tp_plugin: {level}{super().format(record)}"


LOGGER.addHandler(_UnlessConfigured())
if LOGGER.level == logging.NOTSET:
    LOGGER.setLevel(logging.INFO)
