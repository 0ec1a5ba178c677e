"""Vocabulary-parallel losses: fused with the head, or of logits that exist already, and their plain reference.

Letters: N tokens, H hidden size, V vocabulary, v rows of it on this rank. The fused loss splits V over the group::

        product      shape                       sharded axis    collective            bytes of a rank's tensor
        -------      -------------------------   -------------   -------------------   ----------------------
        forward      [N, H] @ [v, H]^T = [N, v]  V of logits     all-gather of rows'   4 * s * N
                                                                 statistics
        dgrad        [N, v] @ [v, H] = [N, H]    V, summed       all-reduce of the     4 * N * H
                                                                 hidden gradient
        wgrad        [N, v]^T @ [N, H] = [v, H]  V of weight     none                  0

The collectives are in float32 (float64 for float64). ``s`` is 3: maximum, sum of exponentials, target logit. One is
added for each of entropy, ``top_id``, ``log_square_sum``, soft targets, and the sum of logits that smoothing and
``mean_logit`` need. A forward in chunks of rows makes one of each collective a chunk, of the same bytes in all.

A scalar loss computes its gradients, and all-reduces, in the forward. Upstream gradients for each token (``"none"``,
statistics) and ``recompute`` need the forward product again in the backward, and the all-reduce is there. ``group``
instead of ``vocab`` costs one exchange of 16 bytes for each weight tensor. The reference gathers the logits [N, V].
"""

from tp_plugin.loss.fused import Logprobs, linear_cross_entropy, linear_logprobs
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
