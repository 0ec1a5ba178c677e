"""Vocabulary-parallel losses: fused with the head, or of logits that exist already, and their plain reference."""

from tp_plugin.loss.functional import linear_cross_entropy
from tp_plugin.loss.logprobs import Logprobs, linear_logprobs
from tp_plugin.loss.reference import Stats, reference_cross_entropy
from tp_plugin.loss.shards import (
    TopK,
    argmax,
    cross_entropy,
    entropy,
    logprobs_of,
    parallel_log_softmax,
    parallel_softmax,
    topk,
)
from tp_plugin.loss.vocab import VocabShard

__all__ = [
    "Logprobs",
    "Stats",
    "TopK",
    "VocabShard",
    "argmax",
    "cross_entropy",
    "entropy",
    "linear_cross_entropy",
    "linear_logprobs",
    "logprobs_of",
    "parallel_log_softmax",
    "parallel_softmax",
    "reference_cross_entropy",
    "topk",
]
