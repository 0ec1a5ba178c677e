"""Losses and log-probabilities fused with the head: :func:`linear_cross_entropy` and :func:`linear_logprobs`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tp_plugin.collectives import copy_to_region, gather_from_region
from tp_plugin.errors import NO_FULLGRAPH, TensorParallelError
from tp_plugin.loss.checks import check_words, head_problem, items_problem, refuse_ids, shift_problem
from tp_plugin.loss.implementations import block_for
from tp_plugin.loss.job import MORE, Goal, Setup
from tp_plugin.loss.node import compute_dtype, fused_head, refuse_transforms
from tp_plugin.loss.parts import Options, Transform, as_rows, logits_dtype_of, wide_of
from tp_plugin.loss.reference import Stats, cap, loss_of_logits, weighted
from tp_plugin.loss.vocab import VocabArguments, VocabShard


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
    class_weights: torch.Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    shift: bool | int = False,
    hidden_grad: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, Stats]:
    """Cross entropy of ``softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``; the full logits never exist.

    A token's loss is torch's cross entropy with class weights and label smoothing, plus
    ``z_loss * logsumexp(logits)**2``, times its ``token_weights``; 0 where its label is ``ignore_index``.

    A collective call over ``group`` when the vocabulary is sharded. The gradient of ``weight`` and ``bias`` is that of
    this rank's rows, the gradient of ``hidden`` the full sum over the group. See :mod:`tp_plugin.loss` for shapes and
    collectives.

    Args:
        hidden: [..., H] floating; equal on all ranks of the group.
        weight: [v, H], this rank's rows; cast to the dtype of ``hidden`` (under autocast both to the autocast dtype).
        labels: [...] integer global ids, the leading dimensions of ``hidden``; equal on all ranks. A label outside the
            vocabulary is a TensorParallelError on CPU; on other devices the device asserts, and the host does not wait.
            Or floating [..., V] or [..., v], probabilities of the full vocabulary or of this rank's words, without
            gradient; then ``ignore_index`` has no meaning, and the mean is over all rows.
        bias: [v] or None.
        group: the ranks that shard the vocabulary, in rank order; None: this rank has all of it. The first call with a
            ``weight`` tensor exchanges the shards' sizes, and all ranks raise together if they do not fit.
        vocab_size: words in all; None: the sum of the shards.
        vocab: the shard, known to the caller, without an exchange; instead of ``group`` and ``vocab_size``.
        ignore_index: label of rows that do not count.
        reduction: ``"mean"`` over the rows that count, ``"sum"``, or ``"none"``.
        label_smoothing: in [0, 1], spread over the full vocabulary as torch does.
        z_loss: weight of the squared log-normaliser (PaLM, https://arxiv.org/abs/2204.02311, section 5).
        scale: multiplies the products.
        softcap: cap of the logits; None or 0 is none.
        token_weights: [...] floating, like the labels. They do not change the divisor of the mean.
        num_items: divides the sum instead of the number of rows that count (``"mean"`` and ``"sum"`` are then one).
        workspace_bytes: working memory; None is 512 MiB, on a CPU 64 MiB.
        impl: ``"chunked"`` (PyTorch); ``"triton"`` (the same with the rows' arithmetic in kernels); ``"reference"``
            (full logits, plain autograd, for tests and double backward); ``"auto"`` picks the fastest available.
        return_stats: return :class:`Stats` too. Gradients through them, as through ``"none"``, cost a second
            computation of the logits.
        recompute: compute the logits again for a scalar loss too: a third more operations, and beside the working
            memory only ``4 * N * H`` bytes instead of ``4 * v * H``.
        class_weights: [V] floating, of the full vocabulary on every rank. As in torch the mean over labels divides by
            the sum of their class weights, and smoothing is weighted too.
        logits_dtype: ``torch.float32`` accumulates and keeps half-precision products in float32; None rounds them to
            the dtype of ``hidden`` as ``F.linear`` does.
        shift: predict the label that many tokens later (True is 1): ``hidden[..., :-shift, :]`` against
            ``labels[..., shift:]``, with ``token_weights[..., shift:]``, as in Cut Cross-Entropy; results have the
            shape of the remaining labels.
        hidden_grad: False leaves the gradient of ``hidden`` out, and its product and its reduction.

    Returns:
        A scalar, or the shape of ``labels`` for ``"none"``; float32, or float64 for float64 ``hidden``. With
        ``return_stats`` a pair. ``"reference"`` returns the dtype of the logits.

    Raises:
        TensorParallelError: shapes, dtypes or options that do not fit together; labels that are not words; an ``impl``
            that cannot run here; a second derivative of all but ``"reference"``.
    """
    options = Options(reduction, ignore_index, label_smoothing, z_loss)
    problem = items_problem(num_items, reduction) or head_problem(hidden, weight, bias, labels, token_weights)
    vocab = _vocab(weight, VocabArguments(group, vocab_size, vocab), problem or shift_problem(shift, labels))
    dtype = compute_dtype(hidden)
    block = block_for(impl, hidden.device, dtype, vocab.group)
    kept = logits_dtype_of(logits_dtype, dtype)
    refuse_transforms(block is None and vocab.group is None)
    check_words(labels, class_weights, vocab)
    refuse_ids(vocab, hidden.dtype, return_stats)
    if shift:
        later = (*[slice(None)] * (hidden.dim() - 2), slice(int(shift), None))
        hidden, labels = hidden[..., : -int(shift), :], labels[later]
        token_weights = None if token_weights is None else token_weights[later]
    lead, flat = hidden.shape[:-1], as_rows(hidden if hidden_grad else hidden.detach())
    goal = Goal.of(labels, class_weights, token_weights, flat, vocab, ignore_index)
    stats: Stats | None
    if block is None:
        own = cap(_products(flat, weight, bias, vocab, dtype, kept or dtype), scale, softcap)
        loss, stats = _of_gathered(own, goal, vocab, options, num_items)
    else:
        setup = Setup(vocab, options, Transform.of(scale, softcap), kept, workspace_bytes, block)
        loss, stats = _fused(flat, weight, bias, goal, setup, num_items, return_stats, recompute)
    loss = loss.reshape(lead) if reduction == "none" else loss
    return (loss, Stats(*(x.reshape(lead) for x in stats))) if return_stats and stats is not None else loss


def _vocab(weight: torch.Tensor, given: VocabArguments, problem: str | None) -> VocabShard:
    rows = weight.shape[0] if weight.dim() else 0
    return given.resolve(weight, rows, problem, f"weight has {rows}")


def _fused(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    goal: Goal,
    setup: Setup,
    num_items: Any,
    return_stats: bool,
    recompute: bool,
) -> tuple[torch.Tensor, Stats | None]:
    """The fused node; plain autograd multiplies by token weights with a gradient and divides by ``num_items``."""
    options, token_weights = setup.options, goal.token_weights
    learned = token_weights is not None and token_weights.requires_grad and torch.is_grad_enabled()
    inside = "none" if learned else options.reduction if num_items is None else "sum"
    folded = None if learned or token_weights is None else token_weights.detach().to(wide_of(hidden.dtype))
    found = fused_head(
        hidden, weight, bias, dataclasses.replace(goal, token_weights=folded),
        dataclasses.replace(setup, options=dataclasses.replace(options, reduction=inside)),
        ("losses", *Stats._fields) if return_stats else ("losses",), recompute,
    )  # fmt: skip
    loss = found["losses"]
    if learned and token_weights is not None:
        valid = goal.valid(options.ignore_index)
        loss = weighted(loss, valid, token_weights)
        if options.reduction != "none":
            loss = loss.sum()
        if options.reduction == "mean" and num_items is None:
            by_class = goal.label_class(valid)
            loss = loss / (valid if by_class is None else by_class).sum()
    stats = Stats(*(found[name] for name in Stats._fields)) if return_stats else None
    return loss if num_items is None else loss / num_items, stats


def _products(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    vocab: VocabShard,
    dtype: torch.dtype,
    kept: torch.dtype,
) -> torch.Tensor:
    """This rank's products [N, v] of factors rounded to ``dtype``, in ``kept``; for the reference."""
    kind = hidden.device.type
    off = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()
    with off:
        entered = copy_to_region(hidden, vocab.group, purpose="loss").to(dtype)
        return F.linear(entered.to(kept), weight.to(dtype).to(kept), None if bias is None else bias.to(kept))


def _of_gathered(
    own: torch.Tensor, goal: Goal, vocab: VocabShard, options: Options, num_items: Any
) -> tuple[torch.Tensor, Stats]:
    """The reference: plain autograd of the logits ``own`` [N, v], gathered over the group."""
    logits = gather_from_region(own, vocab.group, -1, vocab.sizes, purpose="loss")
    soft = goal.soft
    if soft is not None and soft.shape[1] != vocab.size:
        soft = gather_from_region(soft, vocab.group, -1, vocab.sizes, purpose="loss")
    labels = goal.labels if soft is None else soft
    return loss_of_logits(logits, labels, options, goal.token_weights, num_items, goal.classes)


class Logprobs(NamedTuple):
    """Each of the shape of the labels, in float32 (float64 for float64), ``top_id`` in int64; None unless asked for.

    Attributes:
        logprobs: log-probability of the label; 0 where the label is ``ignore_index``. Differentiable.
        entropy: of the softmax, in nats. Differentiable.
        mean_logit: over the vocabulary.
        log_square_sum: logarithm of the sum of the squared probabilities.
        top_id: the word with the largest logit, of several equal ones the lowest.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    mean_logit: torch.Tensor | None
    log_square_sum: torch.Tensor | None
    top_id: torch.Tensor | None


@torch.compiler.disable(reason=NO_FULLGRAPH)
def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    more: Sequence[str] = (),
    bias: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    vocab: VocabShard | None = None,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    workspace_bytes: int | None = None,
    impl: str = "auto",
    logits_dtype: torch.dtype | None = torch.float32,
) -> Logprobs:
    """Log-probabilities of labels under ``softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``.

    One pass over the logits, a chunk of rows at a time, and a second one in the backward. A collective call over the
    group: an all-gather of a few numbers a row each chunk, and one all-reduce of the hidden gradient in the backward.

    Args:
        more: further statistics, of ``entropy``, ``mean_logit``, ``log_square_sum`` and ``top_id``; each adds one
            number a row to the all-gather.
        logits_dtype: float32 by default, since ratios of two policies are exponentials of differences: in bfloat16
            logits of 30 are off by 0.06. None rounds the products to the dtype of ``hidden``, as ``F.linear`` does.

    The other arguments are those of :func:`~tp_plugin.loss.linear_cross_entropy`.

    Raises:
        TensorParallelError: shapes, dtypes or names that do not fit; labels that are not words; an ``impl`` that cannot
            run here, or ``"reference"``; a second derivative.
    """
    problem = head_problem(hidden, weight, bias, labels, None)
    if problem is None and labels.is_floating_point():
        problem = f"linear_logprobs takes integer labels, got {labels.dtype}."
    unknown = sorted(set(more) - set(MORE))
    if problem is None and unknown:
        problem = f"there is no statistic {unknown[0]!r}; choose from {', '.join(MORE)}."
    vocab = _vocab(weight, VocabArguments(group, vocab_size, vocab), problem)
    refuse_transforms()
    refuse_ids(vocab, hidden.dtype, "top_id" in more)
    dtype = compute_dtype(hidden)
    block = block_for(impl, hidden.device, dtype, vocab.group)
    if block is None:
        raise TensorParallelError(f"linear_logprobs has no impl={impl!r}; use 'auto', 'chunked' or 'triton'.")
    kept = logits_dtype_of(logits_dtype, dtype)
    setup = Setup(vocab, Options("none", ignore_index), Transform.of(scale, softcap), kept, workspace_bytes, block)
    flat = as_rows(hidden)
    goal = Goal.of(labels, None, None, flat, vocab, ignore_index)
    found = fused_head(flat, weight, bias, goal, setup, ("logprobs", *more))
    given = {name: x.reshape(labels.shape) for name, x in found.items()}
    return Logprobs(*(given.get(name) for name in Logprobs._fields))  # type: ignore[arg-type]
