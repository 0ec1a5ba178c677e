"""The plain truth that every faster path is tested against, best in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from tp_plugin.loss.parts import Options


class Stats(NamedTuple):
    """What ``return_stats`` gives beside the loss; each of the shape of the labels, differentiable.

    Attributes:
        logprobs: log-probability of the label; 0 where the label is ``ignore_index``.
        entropy: of the softmax over the whole vocabulary, in nats.
        log_z: logarithm of the softmax's normaliser (logsumexp of the logits).
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor
    log_z: torch.Tensor


def cap(logits: torch.Tensor, scale: float = 1.0, softcap: float | None = None) -> torch.Tensor:
    """``scale * logits``, then ``softcap * tanh(./softcap)`` if given (Gemma 2, https://arxiv.org/abs/2408.00118)."""
    logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


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
) -> tuple[torch.Tensor, Stats]:
    """Linear cross entropy of one process that holds everything, and its statistics. Differentiable to any order.

    Args:
        hidden: [N, H], any floating dtype.
        weight: [V, H], the whole vocabulary.
        labels: [N] int64.
        bias: [V] or None.

    Returns:
        The loss, a scalar or [N] for ``reduction="none"``, and the statistics, in the dtype of the logits.
    """
    logits = cap(F.linear(hidden, weight, bias), scale, softcap)
    options = Options(reduction, ignore_index, label_smoothing, z_loss)
    return loss_of_logits(logits, labels, options, token_weights, num_items)


def loss_of_logits(
    logits: torch.Tensor,
    labels: torch.Tensor,
    options: Options,
    token_weights: torch.Tensor | None,
    num_items: int | float | torch.Tensor | None,
) -> tuple[torch.Tensor, Stats]:
    """The loss and the statistics of [N, V] logits."""
    valid = labels != options.ignore_index
    losses = F.cross_entropy(
        logits, labels, reduction="none", ignore_index=options.ignore_index, label_smoothing=options.label_smoothing
    )
    log_z = logits.logsumexp(1)
    losses = losses + torch.where(valid, options.z_loss * log_z.square(), 0.0)
    if token_weights is not None:
        losses = losses * torch.where(valid, token_weights, 0.0)
    logs = logits - log_z.unsqueeze(1)
    logprobs = logs.gather(1, torch.where(valid, labels, 0).unsqueeze(1)).squeeze(1)
    # words masked by -inf have no part in the entropy, and 0 * -inf is no number
    entropy = -(logs.exp() * logs.masked_fill(logs == float("-inf"), 0.0)).sum(1)
    stats = Stats(torch.where(valid, logprobs, 0.0), entropy, log_z)
    if options.reduction == "none":
        return losses, stats
    total = losses.sum()
    if num_items is not None:
        return total / num_items, stats
    return (total / valid.sum() if options.reduction == "mean" else total), stats
