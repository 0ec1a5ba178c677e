"""The library's trainers: what they give the optimizer, and how they load the best model.

An optimizer gets every parameter of the loss. A guide model runs without gradients, so one process never steps it.
DeepSpeed's ZeRO looks each parameter up in the engine's model, and has none of the guide's.

The best model is read by ``load_state_dict``, which fails at ZeRO-3, and the library only logs that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from torch import nn
from transformers import Trainer

from tp_plugin.integrations.accelerate.degree import tp_size
from tp_plugin.integrations.features import SENTENCE_TRAINERS
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.sharding import state_of

MODULE = "sentence_transformers.base.trainer"
GUIDED = {"GISTEmbedLoss", "CachedGISTEmbedLoss"}
"""Losses whose ``guide`` runs without gradients."""


def declare(trainer: ModuleType) -> Upstream:
    """Methods of the base of its trainers."""
    upstream = Upstream(SENTENCE_TRAINERS)
    collects = "the parameters of a loss are collected there"
    upstream.patch(trainer.BaseTrainer, "get_optimizer_cls_and_kwargs", ["args", "model"], collects)(_without_guides)
    reads = "the best model is what DeepSpeed's checkpoint holds"
    upstream.patch(trainer.BaseTrainer, "_load_best_model", [], reads)(_load_best_model)
    return upstream


def _without_guides(original: Callable[..., Any], self: Any, args: Any, model: Any = None) -> Any:
    kind, options = original(self, args, model)
    if tp_size() > 1:
        losses = self.loss.values() if isinstance(self.loss, dict) else [self.loss]
        guides = {id(param) for loss in losses for guide in _guides(loss) for param in guide.parameters()}
        guides -= {id(param) for param in self.model.parameters()}  # one that guides itself
        for group in _groups(options):
            group["params"] = [param for param in group["params"] if id(param) not in guides]
    return kind, options


def _guides(loss: nn.Module) -> Iterator[Any]:
    for part in loss.modules():
        if GUIDED.intersection(kind.__name__ for kind in type(part).__mro__):
            yield part.guide


def _groups(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name in ("params", "model", "optimizer_dict"):
        found = options.get(name)
        for group in found if isinstance(found, list) else ():
            if isinstance(group, dict) and isinstance(group.get("params"), list):
                yield group


def _load_best_model(original: Callable[[Any], None], self: Any) -> None:
    if state_of(self.model) is None:
        original(self)
        return
    step = str(self.state.best_model_checkpoint).rpartition("-")[2]
    if step.isdigit():
        self.model.model_card_data.set_best_model_step(int(step))
    Trainer._load_best_model(self)
