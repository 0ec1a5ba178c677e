"""Logits not computed yet: :func:`lazy_logits` for the head, :func:`materialise_outputs` for the model's exit."""

from tp_plugin.lazy import answered as answered  # rows of the table, which register themselves
from tp_plugin.lazy import recorded as recorded
from tp_plugin.lazy.grad import FactoredGrad
from tp_plugin.lazy.logits import VocabParallelLogits
from tp_plugin.lazy.nodes import lazy_logits
from tp_plugin.lazy.outputs import materialise_outputs

__all__ = ["FactoredGrad", "VocabParallelLogits", "lazy_logits", "materialise_outputs"]
