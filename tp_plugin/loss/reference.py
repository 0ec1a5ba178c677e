"""The plain truth that every faster path is tested against, best in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
    scale: float = 1.0,
    softcap: float | None = None,
    num_items: int | float | torch.Tensor | None = None,
) -> torch.Tensor:
    """Linear cross entropy of one process that holds everything. Differentiable to any order.

    Args:
        hidden: [N, H], any floating dtype.
        weight: [V, H], the whole vocabulary.
        labels: [N] int64.
        bias: [V] or None.
        num_items: with ``reduction="mean"``, what the sum is divided by instead of the number of valid labels.

    Returns:
        A scalar, or [N] for ``reduction="none"``, in the dtype of the logits.
    """
    logits = cap(F.linear(hidden, weight, bias), scale, softcap)
    return loss_of_logits(logits, labels, ignore_index, reduction, label_smoothing, num_items)


def loss_of_logits(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    num_items: int | float | torch.Tensor | None,
) -> torch.Tensor:
    """Torch's cross entropy of [N, V] logits; the sum over ``num_items`` if that is given."""
    total = F.cross_entropy(
        logits,
        labels,
        ignore_index=ignore_index,
        reduction=reduction if num_items is None else "sum",
        label_smoothing=label_smoothing,
    )
    return total if num_items is None else total / num_items
