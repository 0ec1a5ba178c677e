"""One loss to be computed, the statistics of each token, and the gradients that come back for them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from tp_plugin.loss.block import Coefficients, RowStats, Targets, TorchBlock
from tp_plugin.loss.checks import check_labels
from tp_plugin.loss.parts import Head, Options, Scalar, Transform, as_rows, wide_of
from tp_plugin.loss.vocab import VocabShard


def workspace_or_default(workspace_bytes: int | None, device: torch.device) -> int:
    """Bytes of working memory: 512 MiB by default, on a CPU 64 MiB (larger chunks gain nothing there)."""
    if workspace_bytes is not None:
        return workspace_bytes
    return (64 if device.type == "cpu" else 512) << 20


@dataclasses.dataclass(frozen=True)
class Goal:
    """The targets and weights of N rows; inside a node autograd tracks none of the tensors.

    Attributes:
        labels: [N] int64, checked by ``check_labels``.
        soft: [N, v] or [N, V] target probabilities instead of ``labels``, or None.
        classes: [V] class weights in ``head.wide``, or None.
        token_weights: [N] in ``head.wide``, multiply the losses; None is 1.
    """

    labels: torch.Tensor
    soft: torch.Tensor | None = None
    classes: torch.Tensor | None = None
    token_weights: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        labels: torch.Tensor,
        class_weights: torch.Tensor | None,
        token_weights: torch.Tensor | None,
        hidden: torch.Tensor,
        vocab: VocabShard,
        ignore_index: int,
    ) -> Goal:
        """The caller's targets, in rows like ``hidden`` [N, H]; token weights keep their dtype and their gradient.

        Raises:
            TensorParallelError: labels that are not words.
        """
        soft = None
        if labels.is_floating_point():
            soft = as_rows(labels.detach())
            labels = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
        else:
            labels = labels.reshape(-1).long()
            check_labels(labels, hidden.shape[0], vocab, ignore_index)
        classes = None if class_weights is None else class_weights.to(wide_of(hidden.dtype))
        return cls(labels, soft, classes, None if token_weights is None else token_weights.reshape(-1))

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """All four, in the order of the arguments."""
        return self.labels, self.soft, self.classes, self.token_weights

    def valid(self, ignore_index: int) -> torch.Tensor:
        """[N], True for labels that count; for all rows with soft targets."""
        if self.soft is not None:
            return torch.ones_like(self.labels, dtype=torch.bool)
        return self.labels != ignore_index

    def label_class(self, valid: torch.Tensor) -> torch.Tensor | None:
        """[N], the class weight of the label, 0 where not ``valid``; None without class weights or labels."""
        if self.classes is None or self.soft is not None:
            return None
        return torch.where(valid, self.classes[torch.where(valid, self.labels, 0)], 0.0)


@dataclasses.dataclass(frozen=True)
class Setup:
    """All of a loss but its tensors: an autograd node keeps it beside the tensors that it saves.

    Attributes:
        vocab: the rows of the weight.
        options: of the cross entropy.
        transform: from products to logits.
        logits_dtype: of the products, as in ``Head``.
        workspace_bytes: budget of the working memory; None is the default.
        block: the implementation of the rows' arithmetic.
    """

    vocab: VocabShard
    options: Options
    transform: Transform
    logits_dtype: torch.dtype | None = None
    workspace_bytes: int | None = None
    block: Any = TorchBlock

    def job(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, goal: Goal) -> Job:
        """This loss of hidden states [N, H], a weight [v, H] of the same dtype and a bias [v]."""
        return Job(Head(hidden, weight, bias, self.vocab, self.transform, self.logits_dtype), goal, self)


@dataclasses.dataclass(frozen=True)
class Job:
    """One loss to be computed.

    Attributes:
        head: the factors of the logits.
        goal: the targets of its rows.
        setup: all the rest.
    """

    head: Head
    goal: Goal
    setup: Setup

    @property
    def options(self) -> Options:
        """Of the cross entropy."""
        return self.setup.options

    @functools.cached_property
    def valid(self) -> torch.Tensor:
        """[N], as in ``Goal``."""
        return self.goal.valid(self.options.ignore_index)

    @functools.cached_property
    def label_class(self) -> torch.Tensor | None:
        """[N] or None, as in ``Goal``."""
        return self.goal.label_class(self.valid)

    @property
    def divisor(self) -> torch.Tensor:
        """0-dim, of the mean: the rows that count, or the sum of their labels' class weights."""
        return self.valid.sum() if self.label_class is None else self.label_class.sum()

    @property
    def safe_divisor(self) -> torch.Tensor:
        """The same, 1 where no row counts, whose gradients are 0."""
        return torch.where(self.valid.any(), self.divisor, 1)

    @functools.cached_property
    def counted(self) -> torch.Tensor:
        """[N], True for rows that take part: their label counts and their token weight is not 0.

        The gradient of all other rows is 0, even if the upstream gradient is not finite: a loss divided by the number
        of counted rows brings ``1 / 0`` if there is none.
        """
        return self.valid if self.goal.token_weights is None else self.valid & (self.goal.token_weights != 0)

    @functools.cached_property
    def weights(self) -> torch.Tensor:
        """[N] in ``head.wide``: the token weights, 0 where a label does not count."""
        ones = self.valid.to(self.head.wide)
        return ones if self.goal.token_weights is None else torch.where(self.valid, self.goal.token_weights, 0.0)

    @property
    def budget(self) -> int:
        """Bytes of working memory."""
        return workspace_or_default(self.setup.workspace_bytes, self.head.hidden.device)

    @property
    def spare(self) -> int:
        """The part of the budget for products before they are added to a wider sum."""
        return self.budget // 4 if self.head.hidden.dtype != self.head.wide else 0

    def targets(self, rows: slice, start: int, stop: int) -> Targets:
        """The targets of ``rows`` on this rank's words ``[start, stop)``, counted from its first."""
        vocab, classes, soft = self.head.vocab, self.goal.classes, self.goal.soft
        first, end = vocab.start + start, vocab.start + stop
        if classes is not None:
            classes = classes[first:end]
        if soft is not None:
            full = soft.shape[1] == vocab.size
            soft = soft[rows, first:end] if full else soft[rows, start:stop]
            soft = soft.to(self.head.wide) if classes is None else soft.to(self.head.wide) * classes
        return Targets(self.goal.labels[rows], self.valid[rows], first, soft, classes)

    def mass(self, rows: slice, found: torch.Tensor | None) -> torch.Tensor | None:
        """[c], the weighted sum of the target probabilities of ``rows``; None is 1. ``found`` is that of soft ones."""
        return found if self.label_class is None else self.label_class[rows]

    @functools.cached_property
    def _mean_class(self) -> Scalar:
        return 1.0 if self.goal.classes is None else self.goal.classes.mean()

    def _parts(self, mass: torch.Tensor | None) -> tuple[Scalar, Scalar]:
        """The factors of log Z and of the target logit in a row's loss: numbers or [c]."""
        smoothing = self.options.label_smoothing
        if mass is None:
            return 1.0, 1 - smoothing
        return (1 - smoothing) * mass + smoothing * self._mean_class, (
            1 - smoothing
        ) * mass if self.goal.soft is None else 1 - smoothing

    def losses(self, stats: RowStats, mass: torch.Tensor | None = None) -> torch.Tensor:
        """[c] unweighted losses of rows, not yet 0 where ignored; ``mass`` is that of :meth:`mass`."""
        smoothing, z = self.options.label_smoothing, self.options.z_loss
        of_log_z, of_target = self._parts(mass)
        loss = of_log_z * stats.log_z - of_target * stats.target
        if smoothing and stats.logit_sum is not None:
            loss = loss - stats.logit_sum * (smoothing / self.head.vocab.size)
        return loss + z * stats.log_z.square() if z else loss

    def coefficients(
        self, log_z: torch.Tensor, weights: torch.Tensor, mass: torch.Tensor | None = None
    ) -> Coefficients:
        """The gradient of ``weights`` [c] times :meth:`losses`."""
        smoothing, z = self.options.label_smoothing, self.options.z_loss
        of_log_z, of_target = self._parts(mass)
        return Coefficients(
            softmax=weights * (of_log_z + 2 * z * log_z) if z else weights * of_log_z,
            target=weights * of_target,
            uniform=weights * (smoothing / self.head.vocab.size) if smoothing else None,
        )


@dataclasses.dataclass(frozen=True)
class TokenStats:
    """Statistics of each token after a pass over the logits; [N] each, in float32 (float64).

    Attributes:
        losses: unweighted, 0 where ignored.
        logprobs: log-probability of the label, 0 where ignored; of soft targets, the sum of all times their targets.
        log_z: logarithm of the softmax's normaliser.
        entropy: of the softmax; None, as all that follow, unless asked for.
        mean_logit: over the vocabulary.
        log_square_sum: logarithm of the sum of the squared probabilities.
        mass: the sum of the soft targets times class weights.
        top_id: the word with the largest logit, of several equal ones the lowest.
    """

    losses: torch.Tensor
    logprobs: torch.Tensor
    log_z: torch.Tensor
    entropy: torch.Tensor | None = None
    mean_logit: torch.Tensor | None = None
    log_square_sum: torch.Tensor | None = None
    mass: torch.Tensor | None = None
    top_id: torch.Tensor | None = None


MORE = ("entropy", "mean_logit", "log_square_sum", "top_id")
"""Statistics of a token that are collected on request."""


@dataclasses.dataclass(frozen=True)
class Upstream:
    """The gradients that arrive for each token, [N] each or None."""

    losses: torch.Tensor | None = None
    logprobs: torch.Tensor | None = None
    log_z: torch.Tensor | None = None
    entropy: torch.Tensor | None = None

    @property
    def alone(self) -> bool:
        """True if only the losses have one."""
        return self.losses is not None and self.logprobs is None and self.log_z is None and self.entropy is None


UPSTREAM = tuple(field.name for field in dataclasses.fields(Upstream))
"""Results of a loss that have gradients."""
