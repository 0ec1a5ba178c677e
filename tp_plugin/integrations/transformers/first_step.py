"""Trainer's own loss, TRL's among them, is what the guard of the first step computes twice."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import Trainer

from tp_plugin.integrations.contract import Patches, contract
from tp_plugin.sharding.inputs import broadcast_tree
from tp_plugin.verify.first_step import guard_of, same_draws
from tp_plugin.weights.gather import unwrapped


def check_contracts() -> None:
    why = "the guard of the first step runs before it"
    contract(Trainer, "training_step", ["model", "inputs"], why)
    contract(Trainer, "compute_loss", ["model", "inputs"], "the guard of the first step calls it")
    contract(Trainer, "_prepare_inputs", ["inputs"], "the guard of the first step calls it")
    contract(Trainer, "compute_loss_context_manager", [], "the guard of the first step enters it")


def install(patches: Patches) -> None:
    patches.replace(Trainer, "training_step", _training_step_method)


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
            with _unchanged(self), self.compute_loss_context_manager():
                guard.examine(functools.partial(_loss_of, self), batch, unwrapped(model))
        return original(self, model, inputs, *args, **kwargs)

    return training_step


def _loss_of(trainer: Trainer, model: Any, batch: dict[str, Any]) -> Any:
    """The loss of ``model``, which stands in for the trainer's own: DPO's reference may be that without its adapter."""
    own, trainer.model = trainer.model, model
    try:
        return trainer.compute_loss(model, batch)
    finally:
        trainer.model = own


@contextlib.contextmanager
def _unchanged(trainer: Trainer) -> Iterator[None]:
    """Counters and metrics that a trainer keeps about its losses, as they were."""
    kept = {name: value for name, value in vars(trainer).items() if name.startswith("_") and _is_record(value)}
    before = copy.deepcopy(kept)
    try:
        yield
    finally:
        vars(trainer).update(before)


def _is_record(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_record(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(_is_record(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str | torch.Tensor)
