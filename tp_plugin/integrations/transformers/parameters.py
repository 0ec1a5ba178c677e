"""Numbers of parameters are the whole model's, wherever transformers reports or uses them.

A rank holds shards (and under ZeRO-3 not even those), so each would log another number, and ``total_flos``, summed over
all ranks, would count replicated parameters tp times.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import Trainer, trainer
from transformers.modeling_utils import ModuleUtilsMixin

from tp_plugin.integrations.accelerate.degree import tp_size
from tp_plugin.integrations.contract import Patches, contract
from tp_plugin.sharding import state_of
from tp_plugin.weights.gather import unwrapped
from tp_plugin.weights.stream import full_shape


def check_contracts() -> None:
    why = "it would count this rank's shards"
    contract(ModuleUtilsMixin, "num_parameters", ["only_trainable", "exclude_embeddings"], why)
    contract(trainer, "get_model_param_count", ["model", "trainable_only"], why)
    contract(Trainer, "get_num_trainable_parameters", [], why)
    contract(Trainer, "floating_point_ops", ["inputs"], "the ranks of a TP group would each count the batch they share")


def install(patches: Patches) -> None:
    patches.replace(ModuleUtilsMixin, "num_parameters", _num_parameters_method)
    patches.replace(trainer, "get_model_param_count", _get_model_param_count_function)
    patches.replace(Trainer, "get_num_trainable_parameters", _get_num_trainable_parameters_method)
    patches.replace(Trainer, "floating_point_ops", _floating_point_ops_method)


def whole_count(model: Any, *, trainable: bool = False, embeddings: bool = True) -> int | None:
    """Parameters of the unsharded model inside ``model``, each tied one once; None if nothing is sharded in it."""
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


def _num_parameters_method(original: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(original)
    def num_parameters(self: ModuleUtilsMixin, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        whole = whole_count(self, trainable=only_trainable, embeddings=not exclude_embeddings)
        return original(self, only_trainable, exclude_embeddings) if whole is None else whole

    return num_parameters


def _get_model_param_count_function(original: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(original)
    def get_model_param_count(model: nn.Module, trainable_only: bool = False) -> int:
        whole = whole_count(model, trainable=trainable_only)
        return original(model, trainable_only) if whole is None else whole

    return get_model_param_count


def _get_num_trainable_parameters_method(original: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(original)
    def get_num_trainable_parameters(self: Trainer) -> int:
        whole = whole_count(self.model, trainable=True)
        return original(self) if whole is None else whole

    return get_num_trainable_parameters


def _floating_point_ops_method(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def floating_point_ops(self: Trainer, inputs: dict) -> Any:
        count = original(self, inputs)
        return count if state_of(self.model) is None else count / tp_size()  # Trainer sums over the whole world

    return floating_point_ops
