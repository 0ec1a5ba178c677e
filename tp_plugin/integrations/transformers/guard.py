"""The guard of the first step with HF Trainer: it computes the trainer's own loss (TRL's too) twice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedConfig, Trainer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tp_plugin.integrations.features import TRAINER
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.layers.generators import same_draws
from tp_plugin.sharding.inputs import broadcast_tree
from tp_plugin.step_guard.fp32_rerun import CustomKernels, register_kernels
from tp_plugin.step_guard.guard import guard_of

upstream = Upstream(TRAINER)
_CALLED, _LOSS = "the guard of the first step calls it", ["model", "inputs", "return_outputs", "num_items_in_batch"]
upstream.needs(Trainer, "compute_loss", _LOSS, _CALLED)
upstream.needs(Trainer, "_prepare_inputs", ["inputs"], _CALLED)
upstream.needs(Trainer, "compute_loss_context_manager", [], "the guard of the first step enters it")
upstream.needs(
    PreTrainedConfig, "_attn_implementation", None, "the guard chooses attention that takes single precision"
)


@upstream.patch(Trainer, "training_step", ["model", "inputs"], "the guard of the first step runs before it")
def _training_step(
    original: Callable[..., Any], self: Trainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    guard = guard_of(model)
    if guard is not None and guard.due[True]:
        model.train()
        with same_draws(next(guard.model.parameters()).device):
            batch = dict(self._prepare_inputs(dict(inputs)))
        if guard.config.broadcast_batch:
            batch = broadcast_tree(batch, guard.mesh)
        guard.inputs.bring_in_step(guard.model)
        if guard.config.check_batch_every:
            guard.inputs.compare(guard.model, (), batch)
        num_items = args or tuple(kwargs.values())

        def loss(given: Any, piece: dict[str, Any]) -> Any:
            return self.compute_loss(given, piece, **({"num_items_in_batch": num_items[0]} if num_items else {}))

        with _alone(self), self.compute_loss_context_manager():
            guard.examine(loss, batch, model, _beside(self, guard.model), [self, self.state, self.control])
    return original(self, model, inputs, *args, **kwargs)


def _beside(trainer: Trainer, trained: nn.Module) -> list[nn.Module]:
    """Return other sharded models, or their engines, that the trainer's loss may run, such as DPO's reference."""
    guards = {id(value): (value, guard_of(value)) for value in vars(trainer).values()}
    return [value for value, guard in guards.values() if guard is not None and guard.model is not trained]


@contextlib.contextmanager
def _alone(trainer: Trainer) -> Iterator[None]:
    """Keep a loss that gathers numbers for its metrics on this rank, and silent: another rank may have failed."""

    def gathered(value: Any, *_args: Any, **_kwargs: Any) -> Any:
        return tree_map(lambda leaf: leaf[None] if isinstance(leaf, torch.Tensor) and not leaf.dim() else leaf, value)

    def alone(value: Any, *_args: Any, **_kwargs: Any) -> Any:
        return value

    accelerator = trainer.accelerator
    replaced = {(accelerator, "gather"): gathered, (accelerator, "gather_for_metrics"): gathered}
    replaced |= {(accelerator, "reduce"): alone, (accelerator, "pad_across_processes"): alone, (trainer, "log"): alone}
    before = [vars(place).get(name) for place, name in replaced]
    for (place, name), stand_in in replaced.items():
        setattr(place, name, stand_in)
    try:
        yield
    finally:
        for (place, name), own in zip(replaced, before, strict=True):
            if own is None:
                delattr(place, name)
            else:
                setattr(place, name, own)


def _functions(model: nn.Module) -> dict[str, Any]:
    """Return the attention functions of the model by name, without PyTorch's own."""
    names = [config._attn_implementation for config in _configs(model)]
    return {name: ALL_ATTENTION_FUNCTIONS.get(name) for name in names if name not in (None, "eager", "sdpa")}


def _is_half(name: str) -> bool:
    """Tell if it takes half precision only: FlashAttention, and kernels of the hub, named by their repository."""
    return name.startswith("flash") or "/" in name


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    found = {id(config): config for m in model.modules() if (config := vars(m).get("config")) is not None}
    return [config for config in found.values() if isinstance(config, PreTrainedConfig)]


@contextlib.contextmanager
def _attention_of_pytorch(model: nn.Module) -> Iterator[None]:
    """While open, the model uses only PyTorch's attention functions."""
    own = [(config, config._attn_implementation) for config in _configs(model)]
    own = [(config, name) for config, name in own if name not in (None, "eager", "sdpa")]
    other = "sdpa" if all(getattr(m, "_supports_sdpa", True) for m in model.modules()) else "eager"
    for config, _ in own:
        config._attn_implementation_internal = other
    try:
        yield
    finally:
        for config, chosen in own:
            config._attn_implementation_internal = chosen


register_kernels(CustomKernels(_functions, _is_half, _attention_of_pytorch))
