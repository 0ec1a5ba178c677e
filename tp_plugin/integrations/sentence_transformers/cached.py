"""Losses with cached gradients, refused at the ZeRO stages that take one backward a step.

Their backward runs the model again, batch by batch, each with a backward of its own. ZeRO 2 and 3 reduce a gradient in
its first backward and assert that there is no second one.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.features import CACHED_LOSSES
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.sharding import state_of

MODULE = "sentence_transformers.base.losses.gradcache"


def declare(gradcache: ModuleType) -> Upstream:
    """The hook of the backward of every cached loss; losses import it by name."""
    upstream = Upstream(CACHED_LOSSES)
    taken = ["grad_output", "sentence_features", "loss_obj", "cache", "random_states", "ranges"]
    often = "it goes backward several times"
    upstream.patch(gradcache, "_backward_hook", taken, often, everywhere=True)(_backward_hook)
    return upstream


def _backward_hook(
    original: Callable[..., None], grad_output: Any, sentence_features: Any, loss_obj: Any, *args: Any, **kwargs: Any
) -> None:
    engine = getattr(loss_obj, "model", None)
    stage = getattr(engine, "zero_optimization_stage", lambda: 0)()
    if stage >= 2 and state_of(getattr(engine, "module", None)) is not None:
        raise TensorParallelError(
            f"{type(loss_obj).__name__} goes backward once a mini batch, and DeepSpeed's ZeRO stage {stage} takes one "
            "backward a step; use ZeRO stage 1."
        )
    original(grad_output, sentence_features, loss_obj, *args, **kwargs)
