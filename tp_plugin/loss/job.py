"""One loss to be computed, what is then known of each token, and the gradients that come back for it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from tp_plugin.loss.block import Coefficients, RowStats, TorchBlock
from tp_plugin.loss.parts import Head, Options


def workspace_or_default(workspace_bytes: int | None, device: torch.device) -> int:
    """Bytes of working memory: what was asked for, else 512 MiB, on a CPU 64 MiB (larger chunks gain nothing there)."""
    if workspace_bytes is not None:
        return workspace_bytes
    return (64 if device.type == "cpu" else 512) << 20


@dataclasses.dataclass(frozen=True)
class Job:
    """One loss to be computed.

    Attributes:
        head: the factors of the logits.
        labels: [N] int64, checked by ``check_labels``.
        options: what is computed of them.
        token_weights: [N] in ``head.wide``, multiply the losses; None is 1.
        workspace_bytes: budget of the working memory; None is the default.
        block: the implementation of the rows' arithmetic.
    """

    head: Head
    labels: torch.Tensor
    options: Options
    token_weights: torch.Tensor | None = None
    workspace_bytes: int | None = None
    block: Any = TorchBlock

    @functools.cached_property
    def valid(self) -> torch.Tensor:
        """[N], which labels count."""
        return self.labels != self.options.ignore_index

    @functools.cached_property
    def weights(self) -> torch.Tensor:
        """[N] in ``head.wide``: the token weights, 0 where a label does not count."""
        ones = self.valid.to(self.head.wide)
        return ones if self.token_weights is None else torch.where(self.valid, self.token_weights, 0.0)

    @property
    def budget(self) -> int:
        """Bytes."""
        return workspace_or_default(self.workspace_bytes, self.head.hidden.device)

    @property
    def spare(self) -> int:
        """The part of the budget that is kept for products on their way into a wider sum."""
        return self.budget // 4 if self.head.hidden.dtype != self.head.wide else 0

    def losses(self, stats: RowStats) -> torch.Tensor:
        """[c] unweighted losses of rows, not yet 0 where ignored."""
        smoothing, z = self.options.label_smoothing, self.options.z_loss
        loss = stats.log_z - (1 - smoothing) * stats.target
        if smoothing and stats.logit_sum is not None:
            loss = loss - stats.logit_sum * (smoothing / self.head.vocab.size)
        return loss + z * stats.log_z.square() if z else loss

    def coefficients(self, log_z: torch.Tensor, weights: torch.Tensor) -> Coefficients:
        """The gradient of ``weights`` [c] times :meth:`losses`."""
        smoothing, z = self.options.label_smoothing, self.options.z_loss
        return Coefficients(
            softmax=weights * (1 + 2 * z * log_z) if z else weights,
            target=weights * (1 - smoothing),
            uniform=weights * (smoothing / self.head.vocab.size) if smoothing else None,
        )


@dataclasses.dataclass(frozen=True)
class TokenStats:
    """What is known of each token after a pass over the logits; [N] each, in float32 (float64).

    Attributes:
        losses: unweighted, 0 where ignored.
        logprobs: log-probability of the label, 0 where ignored.
        log_z: logarithm of the softmax's normaliser.
        entropy: of the softmax; None, as all that follow, where not asked for.
        mean_logit: over the vocabulary.
        log_square_sum: logarithm of the sum of the squared probabilities.
        top_id: the word with the largest logit, of several equal ones the lowest.
    """

    losses: torch.Tensor
    logprobs: torch.Tensor
    log_z: torch.Tensor
    entropy: torch.Tensor | None = None
    mean_logit: torch.Tensor | None = None
    log_square_sum: torch.Tensor | None = None
    top_id: torch.Tensor | None = None


MORE = ("entropy", "mean_logit", "log_square_sum", "top_id")
"""Statistics of a token that are collected when asked for."""


@dataclasses.dataclass(frozen=True)
class Upstream:
    """The gradients that arrive for each token, [N] each or None."""

    losses: torch.Tensor | None = None
    logprobs: torch.Tensor | None = None
    log_z: torch.Tensor | None = None
    entropy: torch.Tensor | None = None

    @property
    def alone(self) -> bool:
        """Whether only the losses have one."""
        return self.losses is not None and self.logprobs is None and self.log_z is None and self.entropy is None
