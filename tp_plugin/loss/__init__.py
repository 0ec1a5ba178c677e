"""Vocabulary-parallel linear cross entropy: :func:`linear_cross_entropy` on the rows a :class:`VocabShard` names."""

from tp_plugin.loss.functional import linear_cross_entropy
from tp_plugin.loss.reference import reference_cross_entropy
from tp_plugin.loss.vocab import VocabShard

__all__ = ["VocabShard", "linear_cross_entropy", "reference_cross_entropy"]
