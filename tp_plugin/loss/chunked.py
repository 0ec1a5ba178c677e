"""Vocabulary-parallel linear cross entropy in plain PyTorch, some rows at a time: the logits never exist at once.

Letters: N rows (tokens), H hidden size, V vocabulary, v rows of it on this rank, c rows a chunk.

Per chunk: one product gives [c, v] logits; the rows' statistics (maximum, sum of exponentials, target logit, and with
label smoothing the sum of logits) travel in ONE packed all-gather; the logits become their own gradient in place; one
product gives the chunk's part of the hidden gradient, whose all-reduce runs while another product adds to the weight
gradient. Working memory is a budget in bytes, not a function of N. The device is never asked for a value.

The online-softmax merge of (maximum, sum) pairs is that of Milakov and Gimelshein (https://arxiv.org/abs/1805.02867);
gradients in the forward pass are Liger-Kernel's idea (https://arxiv.org/abs/2410.10989).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tp_plugin.collectives import all_gather, all_reduce_
from tp_plugin.config import TensorParallelConfig
from tp_plugin.loss.parts import Head, HeadGrads, Options, Wanted

T = TypeVar("T")
PURPOSE = "loss"  # under which the collectives are counted
DEFAULT_WORKSPACE = TensorParallelConfig.loss_workspace_mib << 20  # bytes


def outside_autocast(function: Callable[..., T]) -> Callable[..., T]:
    """Run ``function(head, ...)`` with autocast off: its dtypes are chosen already."""

    @functools.wraps(function)
    def plainly(head: Head, *args: Any, **kwargs: Any) -> T:
        with torch.autocast(head.hidden.device.type, enabled=False):
            return function(head, *args, **kwargs)

    return plainly


def rows_per_chunk(head: Head, workspace_bytes: int | None) -> int:
    """Rows whose logits fit the budget; at least 1, and the same on every rank of the group.

    A logit takes 4 bytes (8 in float64), its half-precision copy for the matrix product 2 more, and a soft cap
    another 4 (8) for its derivative.
    """
    rows, wide, narrow = head.hidden.shape[0], head.wide.itemsize, head.hidden.dtype.itemsize
    each = wide * (2 if head.transform.tanh else 1) + (narrow if narrow < wide else 0)
    widest = max(head.vocab.sizes)  # the group's, not this rank's: chunk counts must agree
    budget = DEFAULT_WORKSPACE if workspace_bytes is None else workspace_bytes
    fits = max(1, budget // max(1, each * widest))
    chunks = -(-rows // fits)
    return -(-rows // max(1, chunks))


@outside_autocast
def scalar_loss(
    head: Head, labels: torch.Tensor, options: Options, wanted: Wanted | None, workspace_bytes: int | None = None
) -> tuple[torch.Tensor, HeadGrads | None]:
    """Mean or sum of the cross entropy, and its gradients for an upstream gradient of 1. A collective call.

    Args:
        head: the factors of the logits.
        labels: [N] int64, checked by ``check_labels``.
        options: ``reduction`` is ``"mean"`` or ``"sum"``. The mean over no valid label is nan, with zero gradients,
            as in torch.
        wanted: which gradients; None or nothing wanted computes the statistics only.
        workspace_bytes: budget of the working memory; None is the default of the configuration.

    Returns:
        The loss, 0-dim in ``head.wide``; and the gradients as unnormalised sums with their scale beside them, or None.
    """
    valid = labels != options.ignore_index
    losses = torch.zeros(labels.shape[0], dtype=head.wide, device=labels.device)
    sums = _Sums(head, wanted, workspace_bytes) if wanted else None
    ones = valid.to(head.wide)
    for rows in _chunks(head, workspace_bytes):
        chunk = _Chunk(head, head.hidden[rows], labels[rows], valid[rows], options)
        log_z, losses[rows] = chunk.measure()
        if sums is not None:
            sums.add(rows, chunk.gradient_(log_z, ones[rows]))
        del chunk
    total = losses.sum()
    scale = total.new_ones(()) * head.transform.slope
    if options.reduction == "mean":
        count = ones.sum()
        total, scale = total / count, scale / count.clamp(min=1)
    return total, None if sums is None else sums.finish(scale)


@outside_autocast
def token_losses(
    head: Head, labels: torch.Tensor, options: Options, workspace_bytes: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross entropy of every row and the logarithm of its normaliser, [N] each in ``head.wide``. Collective."""
    valid = labels != options.ignore_index
    losses, log_z = torch.zeros(2, labels.shape[0], dtype=head.wide, device=labels.device)
    for rows in _chunks(head, workspace_bytes):
        chunk = _Chunk(head, head.hidden[rows], labels[rows], valid[rows], options)
        log_z[rows], losses[rows] = chunk.measure()
        del chunk
    return losses, log_z


@outside_autocast
def token_grads(
    head: Head,
    labels: torch.Tensor,
    log_z: torch.Tensor,
    upstream: torch.Tensor,
    options: Options,
    wanted: Wanted,
    workspace_bytes: int | None = None,
) -> HeadGrads:
    """Gradients of ``(token_losses * upstream).sum()``, the logits computed a second time. A collective call.

    Args:
        log_z: [N], as ``token_losses`` returned it.
        upstream: [N], any floating dtype. Its largest magnitude goes into the scale, so a loss scale cannot overflow.
    """
    valid = labels != options.ignore_index
    upstream = torch.where(valid, upstream.to(head.wide), 0.0)
    largest = upstream.abs().amax() if upstream.numel() else upstream.new_ones(())
    largest = torch.where(largest > 0, largest, 1.0)
    weights = upstream / largest
    sums = _Sums(head, wanted, workspace_bytes)
    for rows in _chunks(head, workspace_bytes):
        chunk = _Chunk(head, head.hidden[rows], labels[rows], valid[rows], options)
        sums.add(rows, chunk.gradient_(log_z[rows], weights[rows]))
        del chunk
    return sums.finish(largest * head.transform.slope)


def _chunks(head: Head, workspace_bytes: int | None) -> Iterator[slice]:
    rows, size = head.hidden.shape[0], rows_per_chunk(head, workspace_bytes)
    for start in range(0, rows, max(1, size)):
        yield slice(start, min(start + size, rows))


class _Chunk:
    """The logits of some rows, then their exponentials, then their gradient: one buffer, overwritten twice."""

    def __init__(
        self, head: Head, hidden: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor, options: Options
    ) -> None:
        self.head, self.valid, self.options = head, valid, options
        logits = head.transform.apply_(head.products(hidden))
        local = labels - head.vocab.start
        self.mine = valid & (local >= 0) & (local < head.vocab.rows)
        self.target = local.clamp(0, max(0, head.vocab.rows - 1)).unsqueeze(1)
        self.bend = head.transform.bend_(logits.clone()) if head.transform.tanh else None
        if head.vocab.rows:
            self.top = logits.amax(1)
            self.target_logit = torch.where(self.mine, logits.gather(1, self.target).squeeze(1), 0.0)
        else:
            self.top = logits.new_full((len(labels),), float("-inf"))
            self.target_logit = torch.zeros_like(self.top)
        self.logit_sum = logits.sum(1) if options.label_smoothing else None
        # a shard of nothing but -inf (masked words) has the maximum -inf, and -inf - -inf is no number
        self.shift = torch.where(self.top == float("-inf"), 0.0, self.top)
        self.exps = logits.sub_(self.shift.unsqueeze(1)).exp_()

    def measure(self) -> tuple[torch.Tensor, torch.Tensor]:
        """log Z and the loss of each row, [c] each; the chunk's one all-gather. Ignored rows lose 0."""
        own = [self.top, self.exps.sum(1), self.target_logit]
        if self.logit_sum is not None:
            own.append(self.logit_sum)
        everyone = torch.stack(all_gather(torch.stack(own), self.head.vocab.group, purpose=PURPOSE))  # [ranks, k, c]
        tops, sums = everyone[:, 0], everyone[:, 1]
        top = tops.amax(0)
        log_z = top + (sums * (tops - top).exp()).sum(0).log()
        smoothing = self.options.label_smoothing
        loss = log_z - (1 - smoothing) * everyone[:, 2].sum(0)
        if smoothing:
            loss = loss - everyone[:, 3].sum(0) * (smoothing / self.head.vocab.size)
        return log_z, torch.where(self.valid, loss, 0.0)

    def gradient_(self, log_z: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """[c, v] gradient of ``weights`` [c] times the losses, up to ``transform.slope``, in the hidden dtype.

        Takes the place of the exponentials. ``weights`` are 0 where rows are ignored.
        """
        smoothing = self.options.label_smoothing
        d = self.exps.mul_(((self.shift - log_z).exp() * weights).unsqueeze(1))
        if smoothing:
            d.sub_((weights * (smoothing / self.head.vocab.size)).unsqueeze(1))
        if self.head.vocab.rows:
            hit = torch.where(self.mine, weights * (1 - smoothing), 0.0).unsqueeze(1)
            d.scatter_(1, self.target, d.gather(1, self.target) - hit)
        if self.bend is not None:
            d.mul_(self.bend)
        return d.to(self.head.hidden.dtype)


class _Sums:
    """Adds the chunks' gradients up; the hidden gradient's all-reduces are under way until ``finish``."""

    def __init__(self, head: Head, wanted: Wanted, workspace_bytes: int | None) -> None:
        self.head, self.wanted = head, wanted
        self.single = rows_per_chunk(head, workspace_bytes) >= head.hidden.shape[0]
        self.hidden = torch.empty_like(head.hidden, memory_format=torch.contiguous_format) if wanted.hidden else None
        self.weight = self.bias = None
        if wanted.weight and (head.hidden.shape[0] == 0 or not self.single):
            self.weight = torch.zeros_like(head.weight, dtype=head.wide, memory_format=torch.contiguous_format)
        if wanted.bias:
            self.bias = torch.zeros(head.vocab.rows, dtype=head.wide, device=head.hidden.device)
        self.pending: list[dist.Work] = []

    def add(self, rows: slice, d: torch.Tensor) -> None:
        """Take in the gradient [c, v] of the raw products of ``rows``."""
        if self.hidden is not None:
            part = self.hidden[rows]
            torch.mm(d, self.head.weight, out=part)
            work = all_reduce_(part, self.head.vocab.group, purpose=PURPOSE, async_op=True)
            if work is not None:
                self.pending.append(work)
        if self.wanted.weight:
            if self.weight is None:
                self.weight = torch.mm(d.t(), self.head.hidden[rows])
            elif d.dtype == self.weight.dtype:
                self.weight.addmm_(d.t(), self.head.hidden[rows])
            else:
                self.weight.add_(torch.mm(d.t(), self.head.hidden[rows]))
        if self.bias is not None:
            self.bias.add_(d.sum(0, dtype=self.bias.dtype))

    def finish(self, scale: torch.Tensor) -> HeadGrads:
        """Wait for what travels."""
        for work in self.pending:
            work.wait()
        return HeadGrads(self.hidden, self.weight, self.bias, scale)
