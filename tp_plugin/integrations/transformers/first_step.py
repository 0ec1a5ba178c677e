"""Trainer's own loss, TRL's among them, is what the guard of the first step computes twice."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedConfig, Trainer

from tp_plugin.integrations.contract import Patches, contract
from tp_plugin.sharding.inputs import broadcast_tree
from tp_plugin.verify.exact import ASIDE
from tp_plugin.verify.first_step import guard_of, same_draws
from tp_plugin.weights.gather import unwrapped


def check_contracts() -> None:
    why = "the guard of the first step runs before it"
    contract(Trainer, "training_step", ["model", "inputs"], why)
    contract(
        Trainer,
        "compute_loss",
        ["model", "inputs", "return_outputs", "num_items_in_batch"],
        "the guard of the first step calls it",
    )
    contract(PreTrainedConfig, "_attn_implementation", None, "the guard chooses attention that takes single precision")
    contract(Trainer, "_prepare_inputs", ["inputs"], "the guard of the first step calls it")
    contract(Trainer, "compute_loss_context_manager", [], "the guard of the first step enters it")


def install(patches: Patches) -> None:
    patches.replace(Trainer, "training_step", _training_step_method)
    if _without_half_kernels not in ASIDE:
        ASIDE.append(_without_half_kernels)


def _training_step_method(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def training_step(self: Trainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        guard = guard_of(model)
        if guard is not None and guard.due[True]:
            model.train()
            with same_draws(guard.model):
                batch = dict(self._prepare_inputs(dict(inputs)))
            if guard.config.broadcast_batch:
                batch = broadcast_tree(batch, guard.mesh)
            guard.inputs.bring_in_step(guard.model)
            if guard.config.check_batch_every:
                guard.inputs.compare(guard.model, (), batch)
            beside = _beside(self, guard.model)
            loss = functools.partial(_loss_of, self, list(beside), args or tuple(kwargs.values()))
            with _unchanged(self), _alone(self), self.compute_loss_context_manager():
                guard.examine(loss, batch, unwrapped(model), list(beside.values()))
        return original(self, model, inputs, *args, **kwargs)

    return training_step


def _beside(trainer: Trainer, trained: nn.Module) -> dict[str, nn.Module]:
    """By the trainer's attribute: other sharded models that its loss may run, such as DPO's reference."""
    found = {}
    for name, value in vars(trainer).items():
        guard = guard_of(value)
        if guard is not None and guard.model is not trained:
            found[name] = unwrapped(value)
    return found


def _loss_of(
    trainer: Trainer, names: list[str], given: tuple[Any, ...], model: Any, batch: dict[str, Any], *beside: nn.Module
) -> Any:
    """The loss of ``model``, which stands in for the trainer's own: DPO's reference may be that without its adapter.

    ``given`` is what ``training_step`` got besides: the number of items in the whole batch.
    """
    stand_ins = {"model": model, **dict(zip(names, beside, strict=True))}
    own = {name: getattr(trainer, name) for name in stand_ins}
    vars(trainer).update(stand_ins)
    try:
        return trainer.compute_loss(model, batch, **({"num_items_in_batch": given[0]} if given else {}))
    finally:
        vars(trainer).update(own)


@contextlib.contextmanager
def _alone(trainer: Trainer) -> Iterator[None]:
    """Losses that gather numbers for their metrics keep to this rank, and log nothing: another rank may have failed."""

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


@contextlib.contextmanager
def _without_half_kernels(model: nn.Module) -> Iterator[None]:
    """Attention by kernels that take half precision only is that of PyTorch in an exact run."""
    own = {}
    for module in model.modules():
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig) and config._attn_implementation not in (None, "eager", "sdpa"):
            own[id(config)] = config, config._attn_implementation
    other = "sdpa" if all(getattr(m, "_supports_sdpa", True) for m in model.modules()) else "eager"
    for config, _ in own.values():
        config._attn_implementation_internal = other
    try:
        yield
    finally:
        for config, chosen in own.values():
            config._attn_implementation_internal = chosen


@contextlib.contextmanager
def _unchanged(trainer: Trainer) -> Iterator[None]:
    """What a trainer keeps about its losses (counters, lists, metrics) is afterwards what it was."""
    before = {name: _snapshot(value) for name, value in vars(trainer).items() if _size(value) <= _LARGEST}
    try:
        yield
    finally:
        for name, value in before.items():
            now = vars(trainer).get(name)
            if isinstance(value, dict) and isinstance(now, dict):
                now.clear()
                now.update(value)
            elif isinstance(value, list) and isinstance(now, list):
                now[:] = value
            else:
                vars(trainer)[name] = value


_LARGEST = 100_000  # entries; what holds more is data and no record


def _size(value: Any) -> int:
    """Entries of nested records; beyond the largest for what is no record."""
    if isinstance(value, dict | list | tuple):
        total = 1
        for item in value.values() if isinstance(value, dict) else value:
            total += _size(item)
            if total > _LARGEST:
                break
        return total
    return 1 if value is None or isinstance(value, bool | int | float | str | torch.Tensor) else _LARGEST + 1


def _snapshot(value: Any) -> Any:
    """Containers anew, keeping what they make of missing keys; tensors themselves."""
    if isinstance(value, dict):
        made = copy.copy(value)
        made.update({key: _snapshot(item) for key, item in value.items()})
        return made
    return [_snapshot(item) for item in value] if type(value) is list else value
