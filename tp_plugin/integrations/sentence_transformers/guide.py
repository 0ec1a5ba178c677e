"""The guide model of a GIST loss, which trains nothing, kept out of the engine's optimizer.

The library gives its optimizer every parameter of the loss. A guide runs without gradients, so one process never steps
it. DeepSpeed's ZeRO looks each parameter up in the engine's model, and has none of the guide's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from torch import nn

from tp_plugin.integrations.accelerate.degree import tp_size
from tp_plugin.integrations.features import GUIDED_LOSSES
from tp_plugin.integrations.upstream import Upstream

MODULE = "sentence_transformers.base.trainer"
GUIDED = {"GISTEmbedLoss", "CachedGISTEmbedLoss"}
"""Losses whose ``guide`` runs without gradients."""


def declare(trainer: ModuleType) -> Upstream:
    """The method that collects the parameters of the loss."""
    upstream = Upstream(GUIDED_LOSSES)
    collects = "the parameters of a loss are collected there"
    upstream.patch(trainer.BaseTrainer, "get_optimizer_cls_and_kwargs", ["args", "model"], collects)(_without_guides)
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


def _guides(loss: nn.Module) -> Iterator[nn.Module]:
    for part in loss.modules():
        if GUIDED.intersection(kind.__name__ for kind in type(part).__mro__):
            yield part.guide


def _groups(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name in ("params", "model", "optimizer_dict"):
        found = options.get(name)
        for group in found if isinstance(found, list) else ():
            if isinstance(group, dict) and isinstance(group.get("params"), list):
                yield group
