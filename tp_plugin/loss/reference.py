"""The reference in plain autograd, best in float64, that tests compare all faster paths with."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from tp_plugin.loss.parts import Options


class Stats(NamedTuple):
    """Statistics that ``return_stats`` adds to the loss; each of the shape of the labels, differentiable.

    Attributes:
        logprobs: log-probability of the label; 0 where the label is ``ignore_index``. With probabilities for labels the
            sum of all log-probabilities times them and the class weights.
        entropy: of the softmax over the full vocabulary, in nats.
        log_z: logarithm of the softmax's normaliser (logsumexp of the logits).
        top_id: the word with the largest logit, int64, of several equal ones the lowest; no gradient. Equal to the
            label where the model predicted it.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor
    log_z: torch.Tensor
    top_id: torch.Tensor


def cap(logits: torch.Tensor, scale: float = 1.0, softcap: float | None = None) -> torch.Tensor:
    """``scale * logits``, then ``softcap * tanh(./softcap)`` unless None or 0 (Gemma 2, https://arxiv.org/abs/2408.00118)."""
    logits = logits * scale
    return logits if not softcap else softcap * torch.tanh(logits / softcap)


def reference_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
    token_weights: torch.Tensor | None = None,
    num_items: int | float | torch.Tensor | None = None,
    class_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Stats]:
    """Linear cross entropy of one process without shards, and its statistics. Differentiable to any order.

    Args:
        hidden: [N, H], any floating dtype.
        weight: [V, H], the full vocabulary.
        labels: [N] integers, or [N, V] probabilities.
        bias: [V] or None.
        class_weights: [V] or None.

    Returns:
        The loss, a scalar or [N] for ``reduction="none"``, and the statistics, in the dtype of the logits.
    """
    logits = cap(F.linear(hidden, weight, bias), scale, softcap)
    options = Options(reduction, ignore_index, label_smoothing, z_loss)
    return loss_of_logits(logits, labels, options, token_weights, num_items, class_weights)


def weighted(losses: torch.Tensor, valid: torch.Tensor, token_weights: torch.Tensor) -> torch.Tensor:
    """``losses`` times their weights, 0 where not ``valid``; differentiable by both, in the dtype of ``losses``.

    The losses of rows of weight 0 have the gradient 0, even if the upstream one is not finite (divided by 0 rows).
    """
    weights = torch.where(valid, token_weights, 0.0).to(losses.dtype)
    return torch.where(weights != 0, losses, losses.detach()) * weights


def loss_of_logits(
    logits: torch.Tensor,
    labels: torch.Tensor,
    options: Options,
    token_weights: torch.Tensor | None,
    num_items: int | float | torch.Tensor | None,
    class_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Stats]:
    """The loss and the statistics of [N, V] logits, in their dtype; ``labels`` [N] or probabilities [N, V]."""
    soft = labels.is_floating_point()
    labels = labels.to(logits.dtype) if soft else labels.long()
    classes = None if class_weights is None else class_weights.to(logits.dtype)
    valid = torch.ones_like(logits[:, 0], dtype=torch.bool) if soft else labels != options.ignore_index
    losses = F.cross_entropy(
        logits, labels, classes, reduction="none", ignore_index=-100 if soft else options.ignore_index,
        label_smoothing=options.label_smoothing,
    ).to(logits.dtype)  # fmt: skip
    log_z = logits.logsumexp(1)
    losses = losses + torch.where(valid, options.z_loss * log_z.square(), 0.0)
    if token_weights is not None:
        losses = weighted(losses, valid, token_weights)
    logs = logits - log_z.unsqueeze(1)
    if soft:
        logprobs = (logs * labels * (1 if classes is None else classes)).sum(1)
    else:
        logprobs = logs.gather(1, torch.where(valid, labels, 0).unsqueeze(1)).squeeze(1)
    # words masked by -inf do not count in the entropy, and 0 * -inf is nan
    entropy = -(logs.exp() * logs.masked_fill(logs == float("-inf"), 0.0)).sum(1)
    stats = Stats(torch.where(valid, logprobs, 0.0), entropy, log_z, logits.argmax(1))
    if options.reduction == "none":
        return losses, stats
    total = losses.sum()
    if num_items is not None:
        return total / num_items, stats
    if options.reduction == "sum":
        return total, stats
    divisor = valid.sum() if soft or classes is None else classes[labels[valid]].sum()
    return total / divisor, stats
