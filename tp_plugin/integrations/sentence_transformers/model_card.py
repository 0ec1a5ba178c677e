"""The model card of a sharded model, without scores of example sentences.

The card is written with each checkpoint, by rank 0 alone. It has scores that the model computes there, and a forward of
a sharded model waits for the other ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from tp_plugin.integrations.features import MODEL_CARDS
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.sharding import state_of

MODULE = "sentence_transformers.base.model_card"


def declare(model_card: ModuleType) -> Upstream:
    """The method that fills in the card."""
    upstream = Upstream(MODEL_CARDS)
    kind = model_card.BaseModelCardData
    upstream.patch(kind, "to_dict", [], "it runs the model for scores of examples, on rank 0 alone")(_to_dict)
    upstream.needs(kind, "generate_widget_examples", None, "without it no scores are computed")
    return upstream


def _to_dict(original: Callable[..., dict[str, Any]], self: Any) -> dict[str, Any]:
    if state_of(self.model) is None:
        return original(self)
    asked, self.generate_widget_examples = self.generate_widget_examples, False
    try:
        return original(self)
    finally:
        self.generate_widget_examples = asked
