"""Parameter counts are those of the full model, wherever transformers reports or uses them.

A rank has shards, under ZeRO-3 parts of them, so each would log another number. ``total_flos``, summed over all ranks,
would count replicated parameters tp times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import Trainer, trainer
from transformers.modeling_utils import ModuleUtilsMixin

from tp_plugin.integrations.accelerate.degree import tp_size
from tp_plugin.integrations.features import LOGGED_COUNTS
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.param_info import full_shape
from tp_plugin.sharding import state_of
from tp_plugin.weights.gather import unwrapped

upstream = Upstream(LOGGED_COUNTS)
_SHARDS = "it would count this rank's shards"


def full_count(model: Any, *, trainable: bool = False, embeddings: bool = True) -> int | None:
    """Count the parameters of the unsharded model, a tied one once; None if nothing in ``model`` is sharded."""
    if state_of(model) is None:
        return None
    inner = unwrapped(model)
    left_out = set()
    if not embeddings:
        left_out = {f"{name}.weight" for name, module in inner.named_modules() if isinstance(module, nn.Embedding)}
    return sum(
        math.prod(full_shape(param))
        for name, param in inner.named_parameters()
        if name not in left_out and (param.requires_grad or not trainable)
    )


@upstream.patch(ModuleUtilsMixin, "num_parameters", ["only_trainable", "exclude_embeddings"], _SHARDS)
def _num_parameters(
    original: Callable[..., int],
    self: ModuleUtilsMixin,
    only_trainable: bool = False,
    exclude_embeddings: bool = False,
) -> int:
    count = full_count(self, trainable=only_trainable, embeddings=not exclude_embeddings)
    return original(self, only_trainable, exclude_embeddings) if count is None else count


@upstream.patch(trainer, "get_model_param_count", ["model", "trainable_only"], _SHARDS)
def _get_model_param_count(original: Callable[..., int], model: nn.Module, trainable_only: bool = False) -> int:
    count = full_count(model, trainable=trainable_only)
    return original(model, trainable_only) if count is None else count


@upstream.patch(Trainer, "get_num_trainable_parameters", [], _SHARDS)
def _get_num_trainable_parameters(original: Callable[..., int], self: Trainer) -> int:
    count = full_count(self.model, trainable=True)
    return original(self) if count is None else count


@upstream.patch(Trainer, "floating_point_ops", ["inputs"], "the ranks of a TP group would each count their one batch")
def _floating_point_ops(original: Callable[..., Any], self: Trainer, inputs: dict) -> Any:
    count = original(self, inputs)
    return count if state_of(self.model) is None else count / tp_size()  # Trainer sums over the whole world
