"""Logits that are not computed yet: :func:`lazy_logits` of a head, :func:`materialise_outputs` at a model's exit."""

from tp_plugin.lazy import deferred_ops as deferred_ops
from tp_plugin.lazy import reduced_ops as reduced_ops
from tp_plugin.lazy import row_ops as row_ops  # these three fill the dispatch table on import
from tp_plugin.lazy.grad import FactoredGrad
from tp_plugin.lazy.head import lazy_logits
from tp_plugin.lazy.logits import VocabParallelLogits, materialise_outputs
from tp_plugin.lazy.recipe import STEPS

__all__ = ["STEPS", "FactoredGrad", "VocabParallelLogits", "lazy_logits", "materialise_outputs"]
