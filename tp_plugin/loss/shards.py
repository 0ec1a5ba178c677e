"""Functions of logits that exist already, sharded over the vocabulary: ``logits`` are this rank's ``[..., v]``.

All are collective calls over ``group``, and differentiable where their result is floating. They gather a few numbers a
row, never ``[..., V]``. ``group``, ``vocab_size`` and ``vocab`` are those of
:func:`~tp_plugin.loss.linear_cross_entropy`. Logits are a new tensor each time, so each call exchanges the shards'
sizes unless ``vocab`` is given. A rank's gradient of ``logits`` is that of its own shard. Results are equal on all
ranks except where a function says "shard". The gradient that comes back to an equal result must be equal too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from tp_plugin.errors import NO_FULLGRAPH, TensorParallelError
from tp_plugin.loss.checks import check_labels, items_problem, refuse_ids, rows_problem
from tp_plugin.loss.node import refuse_transforms
from tp_plugin.loss.parts import Options
from tp_plugin.loss.reference import Stats, weighted
from tp_plugin.loss.shard_nodes import Rows, Softmax, TopKOfShards
from tp_plugin.loss.vocab import VocabArguments, VocabShard

Group = dist.ProcessGroup | None
_eager = torch.compiler.disable(reason=NO_FULLGRAPH)


class TopK(NamedTuple):
    """``values`` and global ``indices``, [..., k] each."""

    values: torch.Tensor
    indices: torch.Tensor


@_eager
def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    group: Group = None,
    vocab_size: int | None = None,
    vocab: VocabShard | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weights: torch.Tensor | None = None,
    num_items: int | float | torch.Tensor | None = None,
    return_stats: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, Stats]:
    """The loss of :func:`~tp_plugin.loss.linear_cross_entropy` for existing logits. One all-gather; none backward.

    Beside the gradient it allocates nothing of the size of the logits.

    Args:
        logits: [..., v] floating, this rank's words. Not changed.
        labels: [...] integer global ids, equal on all ranks.

    Returns:
        As ``linear_cross_entropy``: float32, or float64 for float64 logits.

    Raises:
        TensorParallelError: arguments that do not fit together; labels that are not words.
    """
    options = Options(reduction, ignore_index, label_smoothing, z_loss)
    problem = items_problem(num_items, reduction)
    problem = problem or rows_problem(tuple(logits.shape[:-1]), labels, token_weights, "logits")
    vocab = _shard_of(logits, VocabArguments(group, vocab_size, vocab), problem)
    flat = labels.reshape(-1).long()
    check_labels(flat, flat.shape[0], vocab, ignore_index)
    refuse_ids(vocab, logits.dtype, return_stats)
    losses, stats = _token_losses(logits, labels.long(), vocab, options, return_stats)
    if token_weights is not None:
        losses = weighted(losses, labels != ignore_index, token_weights)
    if reduction == "none":
        return (losses, stats) if return_stats else losses
    loss = losses.sum()
    if num_items is not None:
        loss = loss / num_items
    elif reduction == "mean":
        loss = loss / (labels != ignore_index).sum()
    return (loss, stats) if return_stats else loss


@_eager
def logprobs_of(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    group: Group = None,
    vocab_size: int | None = None,
    vocab: VocabShard | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Log-probability of each label, [...]; 0 where it is ``ignore_index``. One all-gather."""
    return _stats(logits, labels, VocabArguments(group, vocab_size, vocab), ignore_index).logprobs


@_eager
def entropy(
    logits: torch.Tensor, *, group: Group = None, vocab_size: int | None = None, vocab: VocabShard | None = None
) -> torch.Tensor:
    """Entropy of each row's softmax, [...], in nats. One all-gather."""
    labels = torch.full(logits.shape[:-1], -100, device=logits.device)
    return _stats(logits, labels, VocabArguments(group, vocab_size, vocab)).entropy


@_eager
def parallel_log_softmax(
    logits: torch.Tensor, *, group: Group = None, vocab_size: int | None = None, vocab: VocabShard | None = None
) -> torch.Tensor:
    """This rank's shard [..., v] of the log-softmax, in the dtype of the logits. One all-gather, one reduction back."""
    return Softmax.apply(logits, _shard_of(logits, VocabArguments(group, vocab_size, vocab)), True)


@_eager
def parallel_softmax(
    logits: torch.Tensor, *, group: Group = None, vocab_size: int | None = None, vocab: VocabShard | None = None
) -> torch.Tensor:
    """This rank's shard [..., v] of the softmax, in the dtype of the logits. One all-gather, one all-reduce back."""
    return Softmax.apply(logits, _shard_of(logits, VocabArguments(group, vocab_size, vocab)), False)


@_eager
def argmax(
    logits: torch.Tensor, *, group: Group = None, vocab_size: int | None = None, vocab: VocabShard | None = None
) -> torch.Tensor:
    """Global id of each row's largest logit, [...] int64; of equal ones the lowest. One all-gather."""
    return _top(logits.detach(), 1, VocabArguments(group, vocab_size, vocab)).indices.squeeze(-1)


@_eager
def topk(
    logits: torch.Tensor,
    k: int,
    *,
    group: Group = None,
    vocab_size: int | None = None,
    vocab: VocabShard | None = None,
) -> TopK:
    """The ``k`` largest logits of each row and their global ids, largest first. One all-gather of ``2 k`` a row.

    Raises:
        TensorParallelError: ``k`` outside [1, V].
    """
    return _top(logits, k, VocabArguments(group, vocab_size, vocab))


def _shard_of(logits: torch.Tensor, given: VocabArguments, problem: str | None = None) -> VocabShard:
    if problem is None and not (logits.is_floating_point() and logits.dim()):
        problem = f"logits must be floating [..., v], got {tuple(logits.shape)} of {logits.dtype}."
    refuse_transforms()
    columns = logits.shape[-1] if logits.dim() else 0
    return given.resolve(logits, columns, problem, f"logits have {columns} columns")


def _top(logits: torch.Tensor, k: int, given: VocabArguments) -> TopK:
    vocab = _shard_of(logits, given)
    if not 1 <= k <= vocab.size:
        raise TensorParallelError(f"k must lie in [1, {vocab.size}], the vocabulary, got {k}.")
    return TopK(*TopKOfShards.apply(logits, k, vocab))


def _stats(logits: torch.Tensor, labels: torch.Tensor, given: VocabArguments, ignore_index: int = -100) -> Stats:
    vocab = _shard_of(logits, given, rows_problem(tuple(logits.shape[:-1]), labels, None, "logits"))
    flat = labels.reshape(-1).long()
    check_labels(flat, flat.shape[0], vocab, ignore_index)
    return _token_losses(logits, labels.long(), vocab, Options("none", ignore_index))[1]


def _token_losses(
    logits: torch.Tensor, labels: torch.Tensor, vocab: VocabShard, options: Options, with_top: bool = False
) -> tuple[torch.Tensor, Stats]:
    """Statistics of each row from one Function; the losses follow from them by plain autograd."""
    valid, smoothing = labels != options.ignore_index, options.label_smoothing
    target, entropies, log_z, mean, top_id = Rows.apply(logits, labels, valid, vocab, smoothing > 0, with_top)
    losses = log_z - (1 - smoothing) * target
    if smoothing:
        losses = losses - smoothing * mean
    if options.z_loss:
        losses = losses + options.z_loss * log_z.square()
    return torch.where(valid, losses, 0.0), Stats(torch.where(valid, target - log_z, 0.0), entropies, log_z, top_id)
