"""The functional face of the loss: :func:`linear_cross_entropy`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tp_plugin.collectives import copy_to_region, gather_from_region
from tp_plugin.errors import TensorParallelError
from tp_plugin.loss import chunked
from tp_plugin.loss.parts import Head, HeadGrads, Options, Transform, Wanted, check_labels, unpack
from tp_plugin.loss.reference import cap, loss_of_logits, reference_cross_entropy
from tp_plugin.loss.vocab import VocabShard

IMPLEMENTATIONS = ("auto", "reference", "chunked")


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    vocab: VocabShard | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
    num_items: int | float | torch.Tensor | None = None,
    workspace_bytes: int | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Cross entropy of ``softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`` without holding the logits.

    A collective call over ``vocab.group`` when the vocabulary is sharded; the gradient of ``weight`` and ``bias`` is
    that of this rank's rows, the gradient of ``hidden`` the full sum over the group.

    Args:
        hidden: [..., H] floating; equal on all ranks of the group.
        weight: [v, H], this rank's rows; cast to the dtype of ``hidden`` (under autocast both to the autocast dtype).
        labels: [...] int64, the leading dimensions of ``hidden``; equal on all ranks. See ``check_labels`` for how a
            label outside the vocabulary is refused.
        bias: [v] or None.
        vocab: which rows this rank holds; None: all of them.
        ignore_index: label of rows that do not count.
        reduction: ``"mean"`` over valid rows, ``"sum"``, or ``"none"``.
        label_smoothing: in [0, 1], spread over the whole vocabulary as torch does.
        scale: multiplies the products.
        softcap: cap of the logits, or None.
        num_items: with ``"mean"``, what the sum is divided by instead of the number of valid rows.
        workspace_bytes: working memory of the chunked implementation; None is the configuration's default.
        impl: ``"chunked"``; ``"reference"`` (full logits, plain autograd, for tests and double backward);
            ``"auto"`` picks the fastest there is.

    Returns:
        A scalar, or the shape of ``labels`` for ``"none"``; float32, or float64 for float64 ``hidden``.
        ``"reference"`` returns the dtype of the logits.

    Raises:
        TensorParallelError: shapes, dtypes or options that do not fit together; labels that are not words; a second
            derivative of the chunked implementation.
    """
    vocab = VocabShard.balanced(weight.shape[0], None) if vocab is None else vocab
    options = Options(reduction, ignore_index, label_smoothing)
    _check(hidden, weight, bias, labels, vocab, options, num_items, impl)
    lead, flat = labels.shape, hidden.reshape(-1, hidden.shape[-1])
    labels = labels.reshape(-1)
    check_labels(labels, flat.shape[0], vocab, ignore_index)
    if impl == "reference":
        losses = _reference(flat, weight, bias, labels, vocab, options, scale, softcap, num_items)
    else:
        reduced = options if num_items is None else Options("sum", ignore_index, label_smoothing)
        transform = Transform.of(scale, softcap)
        losses = _Chunked.apply(
            flat, weight, bias, labels, vocab, transform, reduced, workspace_bytes, torch.is_grad_enabled()
        )
        losses = losses if num_items is None else losses / num_items
    return losses.reshape(lead) if reduction == "none" else losses


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    vocab: VocabShard,
    options: Options,
    num_items: Any,
    impl: str,
) -> None:
    problem = None
    if impl not in IMPLEMENTATIONS:
        problem = f"impl must be one of {IMPLEMENTATIONS}, got {impl!r}."
    elif not hidden.is_floating_point() or weight.dim() != 2 or hidden.shape[-1:] != weight.shape[1:]:
        problem = (
            f"hidden [..., H] and weight [v, H] do not fit: {tuple(hidden.shape)} of {hidden.dtype}, "
            f"{tuple(weight.shape)}."
        )
    elif weight.shape[0] != vocab.rows or (bias is not None and bias.shape != (vocab.rows,)):
        shapes = tuple(weight.shape), None if bias is None else tuple(bias.shape)
        problem = f"this rank holds {vocab.rows} rows of the vocabulary, weight and bias have shapes {shapes}."
    elif labels.shape != hidden.shape[:-1]:
        problem = f"labels {tuple(labels.shape)} are not the leading dimensions of hidden {tuple(hidden.shape)}."
    elif num_items is not None and options.reduction != "mean":
        problem = f"num_items replaces the divisor of the mean; it does not go with reduction={options.reduction!r}."
    if problem:
        raise TensorParallelError(problem)


def _reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    vocab: VocabShard,
    options: Options,
    scale: float,
    softcap: float | None,
    num_items: Any,
) -> torch.Tensor:
    """Plain autograd; on a group the logits are gathered."""
    rest = options.ignore_index, options.reduction, options.label_smoothing, num_items
    if vocab.group is None:
        names = ("ignore_index", "reduction", "label_smoothing", "num_items")
        kwargs: dict[str, Any] = dict(zip(names, rest, strict=True))
        return reference_cross_entropy(hidden, weight, labels, bias=bias, scale=scale, softcap=softcap, **kwargs)
    own = F.linear(copy_to_region(hidden, vocab.group, purpose="loss"), weight, bias)
    logits = gather_from_region(cap(own, scale, softcap), vocab.group, -1, vocab.sizes, purpose="loss")
    return loss_of_logits(logits, labels, *rest)


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The dtype in which ``F.linear`` would multiply ``hidden`` here: the autocast dtype under autocast."""
    kind = hidden.device.type
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


class _Chunked(torch.autograd.Function):
    """``chunked.scalar_loss`` and ``chunked.token_losses`` for autograd."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, vocab, transform, options, workspace_bytes, recording):
        ctx.set_materialize_grads(False)
        dtype = compute_dtype(hidden)
        head = Head(
            hidden.detach().to(dtype),
            weight.detach().to(dtype),
            None if bias is None else bias.detach(),
            vocab,
            transform,
        )
        ctx.wanted = Wanted(*ctx.needs_input_grad[:3]) if recording else Wanted(False, False, False)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.setup = vocab, transform, options, workspace_bytes
        if options.reduction == "none":
            losses, log_z = chunked.token_losses(head, labels, options, workspace_bytes)
            ctx.save_for_backward(head.hidden, head.weight, head.bias, labels, log_z)
            return losses
        loss, grads = chunked.scalar_loss(head, labels, options, ctx.wanted, workspace_bytes)
        if grads is not None:
            ctx.save_for_backward(grads.hidden, grads.weight, grads.bias, grads.scale)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        refuse_double_backward()
        if upstream is None:
            return (None,) * 9
        grads = restore(ctx, upstream)
        parts = ("hidden", "weight", "bias")
        return (*(unpack([grads], part, dtype) for part, dtype in zip(parts, ctx.dtypes, strict=True)), *(None,) * 6)


def restore(ctx: Any, upstream: torch.Tensor) -> HeadGrads:
    """The gradients of a node that saved what ``_Chunked.forward`` saves. A collective call for ``"none"``."""
    vocab, transform, options, workspace_bytes = ctx.setup
    if options.reduction == "none":
        hidden, weight, bias, labels, log_z = ctx.saved_tensors
        head = Head(hidden, weight, bias, vocab, transform)
        return chunked.token_grads(head, labels, log_z, upstream, options, ctx.wanted, workspace_bytes)
    return HeadGrads(*ctx.saved_tensors).scaled(upstream)
