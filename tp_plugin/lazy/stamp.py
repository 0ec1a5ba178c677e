"""The step stamp: how many optimizer steps this process has made.

Lazy logits remember the stamp at which they were made. Computed after a step they would silently come from the new
weights, so they refuse.
"""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

_STEPS = 0
_HANDLE: RemovableHandle | None = None


def current() -> int:
    """The stamp of now."""
    return _STEPS


def bump() -> None:
    """Declare that weights have changed. For code that changes them without a ``torch.optim.Optimizer``."""
    global _STEPS
    _STEPS += 1


def install() -> None:
    """Bump after every step of every ``torch.optim.Optimizer`` in this process. Does nothing the second time."""
    global _HANDLE
    if _HANDLE is None:
        _HANDLE = register_optimizer_step_post_hook(_after_step)


def _after_step(*_: Any) -> None:
    bump()
