"""The functional face of the loss: :func:`linear_cross_entropy`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tp_plugin.collectives import copy_to_region, gather_from_region
from tp_plugin.errors import NO_FULLGRAPH, TensorParallelError
from tp_plugin.loss import chunked, implementations
from tp_plugin.loss.checks import check_labels, head_problem, items_problem, vocab_of
from tp_plugin.loss.job import Job, TokenStats, Upstream
from tp_plugin.loss.parts import Head, HeadGrads, Options, Transform, Wanted, unpack, wide_of
from tp_plugin.loss.reference import Stats, cap, loss_of_logits
from tp_plugin.loss.vocab import VocabShard


@torch.compiler.disable(reason=NO_FULLGRAPH)
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    vocab: VocabShard | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
    token_weights: torch.Tensor | None = None,
    num_items: int | float | torch.Tensor | None = None,
    workspace_bytes: int | None = None,
    impl: str = "auto",
    return_stats: bool = False,
    recompute: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, Stats]:
    """Cross entropy of ``softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`` without holding the logits.

    A token's loss is torch's cross entropy with label smoothing, plus ``z_loss * logsumexp(logits)**2``, times its
    ``token_weights``; 0 where its label is ``ignore_index``.

    A collective call over ``group`` when the vocabulary is sharded; the gradient of ``weight`` and ``bias`` is that of
    this rank's rows, the gradient of ``hidden`` the full sum over the group. A chunk of rows costs one all-gather of a
    few numbers a row and, for a scalar loss, one asynchronous all-reduce of its part of the hidden gradient.

    Args:
        hidden: [..., H] floating; equal on all ranks of the group.
        weight: [v, H], this rank's rows; cast to the dtype of ``hidden`` (under autocast both to the autocast dtype).
        labels: [...] int64 global ids, the leading dimensions of ``hidden``; equal on all ranks. One outside the
            vocabulary is a TensorParallelError on CPU; elsewhere the device asserts, so that the host need not wait.
        bias: [v] or None.
        group: the ranks that hold the vocabulary together, in rank order; None: this rank holds all of it. The first
            call with a ``weight`` tensor exchanges the shards' sizes and finds out together what does not fit.
        vocab_size: words in all; None: what the shards add up to.
        vocab: says all of that at once and needs no exchange; instead of ``group`` and ``vocab_size``.
        ignore_index: label of rows that do not count.
        reduction: ``"mean"`` over the rows that count, ``"sum"``, or ``"none"``.
        label_smoothing: in [0, 1], spread over the whole vocabulary as torch does.
        z_loss: weight of the squared log-normaliser (PaLM, https://arxiv.org/abs/2204.02311, section 5).
        scale: multiplies the products.
        softcap: cap of the logits, or None.
        token_weights: [...] floating, like the labels. They do not change the divisor of the mean.
        num_items: divides the sum instead of the number of rows that count (``"mean"`` and ``"sum"`` are then one).
        workspace_bytes: working memory; None is 512 MiB, on a CPU 64 MiB.
        impl: ``"chunked"`` (PyTorch); ``"triton"`` (the same with the rows' arithmetic in kernels); ``"reference"``
            (full logits, plain autograd, for tests and double backward); ``"auto"`` picks the fastest there is.
        return_stats: return :class:`Stats` too. Gradients through them, as through ``"none"``, compute the logits anew.
        recompute: compute the logits anew for a scalar loss too: a third more operations, and beside the working
            memory only ``4 * N * H`` bytes instead of ``4 * v * H``.

    Returns:
        A scalar, or the shape of ``labels`` for ``"none"``; float32, or float64 for float64 ``hidden``. With
        ``return_stats`` a pair. ``"reference"`` returns the dtype of the logits.

    Raises:
        TensorParallelError: shapes, dtypes or options that do not fit together; labels that are not words; an ``impl``
            that cannot run here; a second derivative of all but ``"reference"``.
    """
    options = Options(reduction, ignore_index, label_smoothing, z_loss)
    problem = items_problem(num_items, reduction) or head_problem(hidden, weight, bias, labels, token_weights)
    rows = weight.shape[0] if weight.dim() else 0
    vocab = vocab_of(weight, rows, group, vocab_size, vocab, problem, f"weight has {rows}")
    block = implementations.block_for(impl, hidden.device, compute_dtype(hidden))
    lead, flat, labels = labels.shape, hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    check_labels(labels, flat.shape[0], vocab, ignore_index)
    weights = None if token_weights is None else token_weights.reshape(-1)
    stats: Stats | None
    if block is None:
        loss, stats = _reference(flat, weight, bias, labels, vocab, options, scale, softcap, weights, num_items)
    else:
        how = vocab, Transform.of(scale, softcap), workspace_bytes, block, return_stats, recompute
        loss, stats = _fused(flat, weight, bias, labels, weights, options, num_items, how)
    loss = loss.reshape(lead) if reduction == "none" else loss
    return (loss, Stats(*(x.reshape(lead) for x in stats))) if return_stats and stats is not None else loss


def _fused(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    token_weights: torch.Tensor | None,
    options: Options,
    num_items: Any,
    how: tuple,
) -> tuple[torch.Tensor, Stats | None]:
    """The fused node, and around it what autograd does as well: learned token weights, the division by num_items."""
    learned = token_weights is not None and token_weights.requires_grad and torch.is_grad_enabled()
    inside = "none" if learned else options.reduction if num_items is None else "sum"
    folded = None if learned or token_weights is None else token_weights.detach().to(wide_of(hidden.dtype))
    asked = dataclasses.replace(options, reduction=inside)
    loss, *found = _Fused.apply(hidden, weight, bias, labels, folded, (asked, *how), torch.is_grad_enabled())
    if learned and token_weights is not None:
        loss = loss * torch.where(labels != options.ignore_index, token_weights, 0.0).to(loss.dtype)
        if options.reduction != "none":
            loss = loss.sum()
        if options.reduction == "mean" and num_items is None:
            loss = loss / (labels != options.ignore_index).sum()
    return loss if num_items is None else loss / num_items, Stats(*found) if found else None


def _reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    vocab: VocabShard,
    options: Options,
    scale: float,
    softcap: float | None,
    token_weights: torch.Tensor | None,
    num_items: Any,
) -> tuple[torch.Tensor, Stats]:
    """Plain autograd; on a group the logits are gathered."""
    own = F.linear(copy_to_region(hidden, vocab.group, purpose="loss"), weight, bias)
    logits = gather_from_region(cap(own, scale, softcap), vocab.group, -1, vocab.sizes, purpose="loss")
    return loss_of_logits(logits, labels, options, token_weights, num_items)


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The dtype in which ``F.linear`` would multiply ``hidden`` here: the autocast dtype under autocast."""
    kind = hidden.device.type
    if not torch.amp.is_autocast_available(kind):
        return hidden.dtype
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def refuse_double_backward() -> None:
    """Raise inside a backward that is itself being recorded."""
    if torch.is_grad_enabled():
        raise TensorParallelError(
            "the fused cross entropy has no second derivative (create_graph=True); use "
            'linear_cross_entropy(..., impl="reference"), or logits.materialize() before the loss.'
        )


class _Fused(torch.autograd.Function):
    """The loss, and with ``return_stats`` the statistics, for autograd."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, token_weights, setup, recording):
        ctx.set_materialize_grads(False)
        options, vocab, transform, workspace_bytes, block, return_stats, recompute = setup
        dtype = compute_dtype(hidden)
        bias_values = None if bias is None else bias.detach()
        head = Head(hidden.detach().to(dtype), weight.detach().to(dtype), bias_values, vocab, transform)
        job = Job(head, labels, options, token_weights, workspace_bytes, block)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        wanted = Wanted(*ctx.needs_input_grad[:3]) if recording else Wanted(False, False, False)
        more = ("entropy",) if return_stats else ()
        loss, stats = run(ctx, job, wanted, stats=return_stats, more=more, recompute=recompute)
        return (loss, stats.logprobs, stats.entropy, stats.log_z) if return_stats else (loss,)

    @staticmethod
    def backward(ctx, loss, logprobs=None, entropy=None, log_z=None):
        refuse_double_backward()
        if all(x is None for x in (loss, logprobs, entropy, log_z)):
            return (None,) * 7
        grads = restore(ctx, Upstream(loss, logprobs, log_z, entropy))
        grads = dataclasses.replace(grads, fresh=not ctx.direct)
        parts = ("hidden", "weight", "bias")
        return (*(unpack([grads], part, dtype) for part, dtype in zip(parts, ctx.dtypes, strict=True)), *(None,) * 4)


def run(
    ctx: Any, job: Job, wanted: Wanted, *, stats: bool = False, more: Sequence[str] = (), recompute: bool = False
) -> tuple[torch.Tensor, TokenStats]:
    """The forward of an autograd node over ``job``; what :func:`restore` needs is kept in ``ctx``.

    Args:
        ctx: of the node.
        wanted: which gradients the backward will be asked for.
        stats: whether the statistics of a scalar loss have gradients.
        more: which of ``job.MORE`` are among the statistics.
        recompute: keep no gradients of a scalar loss, but what they are computed from.
    """
    scalar, head = job.options.reduction != "none", job.head
    ctx.direct = scalar and bool(wanted) and not recompute
    if scalar:
        loss, grads, found = chunked.scalar_loss(job, wanted if ctx.direct else None, more)
    else:
        grads, found = None, chunked.token_stats(job, more)
        loss = found.losses if job.token_weights is None else found.losses * job.weights
    made = (None,) * 4 if grads is None else (grads.hidden, grads.weight, grads.bias, grads.scale)
    again: tuple = (None,) * 7
    if wanted and (stats or not ctx.direct):
        again = head.hidden, head.weight, head.bias, job.labels, job.token_weights, found.log_z, found.entropy
    ctx.save_for_backward(*made, *again)
    ctx.wanted, ctx.setup = wanted, (head.vocab, head.transform, job.options, job.workspace_bytes, job.block)
    return loss, found


def restore(ctx: Any, upstream: Upstream) -> HeadGrads:
    """The gradients of a node whose forward was :func:`run`.

    A collective call, one all-reduce, unless they were made in the forward already.
    """
    hidden, weight, bias, scale, *again = ctx.saved_tensors
    if ctx.direct and upstream.alone and upstream.losses is not None:
        return HeadGrads(hidden, weight, bias, scale).scaled(upstream.losses)
    vocab, transform, options, workspace_bytes, block = ctx.setup
    hidden, weight, bias, labels, token_weights, log_z, entropy = again
    job = Job(Head(hidden, weight, bias, vocab, transform), labels, options, token_weights, workspace_bytes, block)
    losses = upstream.losses
    if losses is not None:
        losses = losses.to(job.head.wide) * job.weights
        if options.reduction == "mean":
            losses = losses / job.valid.sum().clamp(min=1)
    return chunked.token_grads(job, log_z, entropy, dataclasses.replace(upstream, losses=losses), ctx.wanted)
