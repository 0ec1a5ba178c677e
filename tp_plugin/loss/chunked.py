"""Vocabulary-parallel linear cross entropy, chunk by chunk: the logits never exist at once.

Letters: N rows (tokens), H hidden size, V vocabulary, v rows of it on this rank, c rows a chunk.

*Gradients in the forward* (6NvH operations, the minimum) serve a scalar loss. For each chunk of rows:

1. One product makes the logits [c, v].
2. One packed all-gather sends the rows' statistics while the product of the next chunk runs.
3. The logits become their own gradient in place.
4. One product makes the chunk's part of the hidden gradient, and another adds to the weight gradient while the
   all-reduce of the first runs.

*Recomputation* (8NvH) serves losses with an upstream gradient for each token, and saves memory on request. The forward
computes statistics by rows. The backward computes the logits again, tile by tile, without an accumulator as large as
the weight.

Working memory is a budget in bytes, not a function of N. The host never reads a value from the device.

Gradients in the forward pass are Liger-Kernel's idea (https://arxiv.org/abs/2410.10989), recomputation from the
normaliser that of Cut Cross-Entropy (https://arxiv.org/abs/2411.09009).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from tp_plugin.collectives import start_all_gather
from tp_plugin.loss.block import Asked, Block, Coefficients, RowStats, merge
from tp_plugin.loss.job import Job, TokenStats, Upstream
from tp_plugin.loss.parts import HeadGrads, Wanted
from tp_plugin.loss.products import PURPOSE, RowSums, TileSums

T = TypeVar("T")


def outside_autocast(function: Callable[..., T]) -> Callable[..., T]:
    """Run ``function(job, ...)`` with autocast off, since its dtypes are chosen already."""

    @functools.wraps(function)
    def plainly(job: Job, *args: Any, **kwargs: Any) -> T:
        kind = job.head.hidden.device.type
        if not torch.amp.is_autocast_available(kind):  # meta tensors, with which memory is counted
            return function(job, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(job, *args, **kwargs)

    return plainly


def rows_per_chunk(job: Job, asked: Asked) -> int:
    """Rows whose logits fit the budget; at least 1, and the same on every rank of the group.

    On a group two chunks exist at a time, unless one has all rows: the next, and one whose all-gather runs.
    """
    rows = job.head.hidden.shape[0]
    widest = max(1, *job.head.vocab.sizes)  # the group's, not this rank's: chunk counts must agree
    room, each = job.budget - job.spare, job.setup.block.bytes_per_logit(job.head, asked) * widest
    if rows * each <= room:
        return rows
    if job.head.vocab.group is not None:
        each += job.setup.block.bytes_per_logit(job.head, Asked(gradient=False)) * widest
    chunks = -(-rows // max(1, room // each))
    return -(-rows // chunks)


@outside_autocast
def scalar_loss(
    job: Job, wanted: Wanted | None, more: Sequence[str] = ()
) -> tuple[torch.Tensor, HeadGrads | None, TokenStats]:
    """Mean or sum of the cross entropy, and its gradients for an upstream gradient of 1. A collective call.

    Args:
        job: its ``options.reduction`` is ``"mean"`` or ``"sum"``. The mean over no valid label is nan, with zero
            gradients, as in torch.
        wanted: the gradients to compute; None computes the statistics only.
        more: those of ``job.MORE`` that the statistics include.

    Returns:
        The loss, 0-dim in ``head.wide``; the gradients as unnormalised sums with their scale beside them, or None;
        and the statistics.
    """
    head, (weights, largest) = job.head, _normalised(job)
    asked = _asked(job, more, bool(wanted))
    single = rows_per_chunk(job, asked) >= head.hidden.shape[0]
    sums = RowSums(head, wanted, single, job.spare) if wanted else None
    found = _Collected(job, more)
    for rows, block, stats in _passes(job, asked):
        found.put(rows, stats)
        if sums is not None:
            by = job.coefficients(stats.log_z, weights[rows], job.mass(rows, stats.mass))
            sums.add(rows, block.gradient_(stats.log_z, stats.entropy, by))
        del block
    total = (found.stats.losses * job.weights).sum()
    scale = largest * head.transform.slope
    if job.options.reduction == "mean":
        total, scale = total / job.divisor, scale / job.safe_divisor
    return total, None if sums is None else sums.finish(scale), found.stats


@outside_autocast
def token_stats(job: Job, more: Sequence[str] = ()) -> TokenStats:
    """The cross entropy and the statistics of every row, with those of ``job.MORE`` named. A collective call."""
    asked = _asked(job, more, gradient=False)
    found = _Collected(job, more)
    for rows, block, stats in _passes(job, asked):
        del block  # before the next one is made
        found.put(rows, stats)
    return found.stats


@outside_autocast
def token_grads(
    job: Job,
    log_z: torch.Tensor,
    entropy: torch.Tensor | None,
    mass: torch.Tensor | None,
    upstream: Upstream,
    wanted: Wanted,
) -> HeadGrads:
    """Gradients of the sum of the statistics times ``upstream``, with the logits computed a second time.

    A collective call: one all-reduce.

    Args:
        log_z: [N], as in ``TokenStats``.
        entropy: as there; needed if it has an upstream gradient.
        mass: as there; needed with soft targets.
        upstream: any floating dtypes. The largest magnitude goes into the scale, so a loss scale cannot overflow.
    """
    head, wide = job.head, job.head.wide
    counted = (torch.where(job.valid, x, 0.0) if x is not None else None for x in (upstream.losses, upstream.logprobs))
    arrived = [None if x is None else x.to(wide) for x in (*counted, upstream.log_z, upstream.entropy)]
    peaks = [x.abs().amax() for x in arrived if x is not None and x.numel()]
    largest = torch.stack(peaks).amax() if peaks else torch.ones((), dtype=wide, device=head.hidden.device)
    largest = torch.where(largest > 0, largest, 1.0)
    by = _combined(job, log_z, mass, *(None if x is None else x / largest for x in arrived))
    sums = TileSums(head, wanted, job.spare)
    asked = Asked(entropy=by.entropy is not None, mass=job.goal.soft is not None)
    height, width = _tile(job, asked)
    for left in range(0, head.weight.shape[0], width):
        columns = slice(left, min(left + width, head.weight.shape[0]))
        part = head.columns(columns.start, columns.stop)
        for top in range(0, head.hidden.shape[0], height):
            rows = slice(top, min(top + height, head.hidden.shape[0]))
            targets = job.targets(rows, columns.start, columns.stop)
            block = job.setup.block.of_head(part, head.hidden[rows], targets, asked, job.spare)
            row_entropy = None if entropy is None else entropy[rows]
            sums.add(rows, columns, block.gradient_(log_z[rows], row_entropy, by[rows]))
            del block
    return sums.finish(largest * head.transform.slope)


def _asked(job: Job, more: Sequence[str], gradient: bool) -> Asked:
    return Asked(
        logit_sum=job.options.label_smoothing > 0 or "mean_logit" in more,
        entropy="entropy" in more,
        gradient=gradient,
        square_sum="log_square_sum" in more,
        mass=job.goal.soft is not None,
        top_id="top_id" in more,
    )


def _normalised(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    """The token weights with largest magnitude 1, and that magnitude, 0-dim, which half precision may not represent."""
    if job.goal.token_weights is None or not job.weights.numel():
        return job.weights, job.weights.new_ones(())
    largest = job.weights.abs().amax()
    largest = torch.where(largest > 0, largest, 1.0)
    return job.weights / largest, largest


def _passes(job: Job, asked: Asked) -> Iterator[tuple[slice, Block, RowStats]]:
    """Every chunk with its merged statistics; on a group the next chunk starts while the all-gather runs."""
    head, size = job.head, rows_per_chunk(job, asked)
    total, ahead = head.hidden.shape[0], None
    for start in range(0, total, max(1, size)):
        rows = slice(start, min(start + size, total))
        targets = job.targets(rows, 0, head.vocab.rows)
        block = job.setup.block.of_head(head, head.hidden[rows], targets, asked, job.spare)
        sent = start_all_gather(block.statistics(), head.vocab.group, purpose=PURPOSE)
        if ahead is not None:
            yield ahead[0], ahead[1], merge(ahead[2](), asked)
        ahead = rows, block, sent
        del block, targets  # ahead has the only reference, so the memory is free before the next block
        if head.vocab.group is None:
            yield ahead[0], ahead[1], merge(ahead[2](), asked)
            ahead = None
    if ahead is not None:
        yield ahead[0], ahead[1], merge(ahead[2](), asked)


class _Collected:
    """TokenStats, filled chunk by chunk."""

    def __init__(self, job: Job, more: Sequence[str]) -> None:
        self.job = job
        names = ["losses", "logprobs", "log_z", *more, *(["mass"] if job.goal.soft is not None else [])]
        # separate tensors, because callers may change them in place, which views of one tensor refuse
        shape, wide, device = job.goal.labels.shape, job.head.wide, job.goal.labels.device
        self.stats = TokenStats(**{name: torch.zeros(shape, dtype=wide, device=device) for name in names})

    def put(self, rows: slice, stats: RowStats) -> None:
        valid, all_rows = self.job.valid[rows], self.stats
        all_rows.losses[rows] = torch.where(valid, self.job.losses(stats, self.job.mass(rows, stats.mass)), 0.0)
        log_z = stats.log_z if stats.mass is None else stats.log_z * stats.mass
        all_rows.logprobs[rows] = torch.where(valid, stats.target - log_z, 0.0)
        all_rows.log_z[rows] = stats.log_z
        if all_rows.mean_logit is not None and stats.logit_sum is not None:
            all_rows.mean_logit[rows] = stats.logit_sum / self.job.head.vocab.size
        for name in ("entropy", "log_square_sum", "mass", "top_id"):
            if getattr(all_rows, name) is not None:
                getattr(all_rows, name)[rows] = getattr(stats, name)


def _combined(
    job: Job,
    all_log_z: torch.Tensor,
    mass: torch.Tensor | None,
    losses: torch.Tensor | None,
    logprobs: torch.Tensor | None,
    log_z: torch.Tensor | None,
    entropy: torch.Tensor | None,
) -> Coefficients:
    zero = torch.zeros_like(all_log_z)
    by = Coefficients(zero, zero)
    if losses is not None:
        by = job.coefficients(all_log_z, losses, job.mass(slice(None), mass))
    if logprobs is not None:
        softmax = by.softmax - (logprobs if mass is None else logprobs * mass)
        by = dataclasses.replace(by, softmax=softmax, target=by.target - logprobs)
    if log_z is not None:
        by = dataclasses.replace(by, softmax=by.softmax + log_z)
    return by if entropy is None else dataclasses.replace(by, entropy=entropy)


def _tile(job: Job, asked: Asked) -> tuple[int, int]:
    """Rows and columns of a tile: all rows if they fit together with 2048 columns.

    Then a column's weight gradient is one product. Otherwise the column's float32 sum takes a quarter of the budget.
    """
    head, each = job.head, job.setup.block.bytes_per_logit(job.head, asked)
    rows, columns = head.hidden.shape[0], max(1, head.weight.shape[0])
    room = max(1, job.budget - job.spare)
    if room // max(1, each * rows) >= min(columns, 2048):
        return max(1, rows), min(columns, room // max(1, each * rows))
    width = min(columns, max(1, room // 4 // (max(1, head.hidden.shape[1]) * head.wide.itemsize)))
    return max(1, min(rows, room * 3 // 4 // (each * width))), width
