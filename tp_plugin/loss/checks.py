"""Refusals of arguments that do not fit together: shapes, dtypes, labels."""

from __future__ import annotations

import sys
from typing import Any

import torch

from tp_plugin.errors import TensorParallelError
from tp_plugin.loss.vocab import VocabShard

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def items_problem(num_items: Any, reduction: str) -> str | None:
    """The objection to a divisor of the sum where no sum is made, or None."""
    if num_items is not None and reduction == "none":
        return "num_items divides a sum, and reduction='none' has no sum; leave one of them out."
    return None


def head_problem(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    token_weights: torch.Tensor | None,
) -> str | None:
    """The objection to the shapes and dtypes of one rank's inputs, a sentence, or None."""
    if not hidden.is_floating_point() or hidden.dim() == 0 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        return (
            f"hidden [..., H] and weight [v, H] do not fit: {tuple(hidden.shape)} of {hidden.dtype}, "
            f"{tuple(weight.shape)}."
        )
    if not weight.is_floating_point() or (bias is not None and bias.shape != weight.shape[:1]):
        shape = None if bias is None else tuple(bias.shape)
        return f"weight is {tuple(weight.shape)} of {weight.dtype} and bias {shape}; they do not fit."
    if len({x.device for x in (hidden, weight, labels) if x is not None}) > 1:
        return f"hidden is on {hidden.device}, weight on {weight.device}, labels on {labels.device}; move them to one."
    soft = labels.is_floating_point() and labels.dim() == hidden.dim()
    if soft and labels.requires_grad:
        return "labels that are probabilities get no gradient; pass labels.detach()."
    return rows_problem(tuple(hidden.shape[:-1]), labels, token_weights, "hidden", soft)


def shift_problem(shift: int, labels: torch.Tensor) -> str | None:
    """The objection to a shift along the last dimension of ``labels`` (the last but one of probabilities), or None."""
    lead = labels.shape[:-1] if labels.is_floating_point() else labels.shape
    if shift and not (lead and 0 < shift < lead[-1]):
        return f"shift must lie in [0, {lead[-1] if lead else 1}), the tokens of a sequence, got {int(shift)}."
    return None


def check_words(labels: torch.Tensor, class_weights: torch.Tensor | None, vocab: VocabShard) -> None:
    """Refuse probabilities and class weights that are not one number a word; the same on all ranks of the group.

    Raises:
        TensorParallelError: probabilities [..., n] with n neither the words of the vocabulary nor of this rank; class
            weights that are not floating [V].
    """
    if labels.is_floating_point() and labels.shape[-1] not in (vocab.size, vocab.rows):
        raise TensorParallelError(
            f"labels {tuple(labels.shape)} of {labels.dtype} are probabilities of {labels.shape[-1]} words; give those "
            f"of the vocabulary ({vocab.size}) or of this rank ({vocab.rows})."
        )
    if class_weights is None:
        return
    if class_weights.shape != (vocab.size,) or not class_weights.is_floating_point() or class_weights.requires_grad:
        raise TensorParallelError(
            f"class_weights must be floating [{vocab.size}], of the full vocabulary and without gradient, got "
            f"{tuple(class_weights.shape)} of {class_weights.dtype}, requires_grad={class_weights.requires_grad}."
        )


def rows_problem(
    lead: tuple[int, ...], labels: torch.Tensor, token_weights: torch.Tensor | None, what: str, soft: bool = False
) -> str | None:
    """The objection to labels (``soft``: probabilities) and token weights for ``what`` of dimensions ``lead``."""
    if labels.dtype not in INTEGERS and not soft:
        return f"expected int64 labels (or a smaller integer type), got {labels.dtype} of {tuple(labels.shape)}."
    if tuple(labels.shape[:-1] if soft else labels.shape) != lead:
        return f"labels {tuple(labels.shape)} are not the leading dimensions {lead} of {what}."
    if token_weights is not None and (tuple(token_weights.shape) != lead or not token_weights.is_floating_point()):
        return (
            f"token_weights {tuple(token_weights.shape)} of {token_weights.dtype} must be floating and have the "
            f"shape {lead} of the labels."
        )
    return None


_EXACT = {torch.float64: 1 << 53}  # the largest exact id in the statistics' dtype; 2^24 in float32


def refuse_ids(vocab: VocabShard, dtype: torch.dtype, asked: bool = True) -> None:
    """Raise TensorParallelError if ids are ``asked`` of statistics of ``dtype`` that cannot represent them."""
    if asked and vocab.size > _EXACT.get(dtype, 1 << 24):
        raise TensorParallelError(
            f"a vocabulary of {vocab.size} words has ids that statistics of {dtype} logits cannot represent; leave out "
            "return_stats or top_id."
        )


def check_labels(labels: torch.Tensor, rows: int, vocab: VocabShard, ignore_index: int) -> None:
    """Refuse labels that are not words. Labels are equal on all ranks of a group, so all ranks refuse together.

    On CPU the labels are read and a TensorParallelError is raised. On other devices a read would stall the host, and
    while ``make_fx`` traces there are no values. There the check is ``torch._assert_async``: the device stops with
    this sentence.

    Args:
        labels: [N] integers.
        rows: N of the hidden states.
        vocab: the vocabulary.
        ignore_index: the label of rows that do not count.

    Raises:
        TensorParallelError: wrong shape or dtype; on CPU a label outside [0, V) that is not ``ignore_index``.
    """
    if labels.dtype != torch.int64 or labels.shape != (rows,):
        raise TensorParallelError(
            f"expected {rows} int64 labels, one a row of the hidden states, got {labels.dtype} of "
            f"shape {tuple(labels.shape)}."
        )
    if labels.is_meta:
        return
    wrong = ((labels < 0) | (labels >= vocab.size)) & (labels != ignore_index)
    if labels.device.type != "cpu" or _traced(labels):
        message = f"a label is outside the vocabulary [0, {vocab.size}) and is not ignore_index {ignore_index}"
        torch._assert_async(~wrong.any(), message)
    elif bool(wrong.any()):
        worst = labels[wrong][0].item()
        raise TensorParallelError(
            f"label {worst} is outside the vocabulary [0, {vocab.size}) and is not ignore_index ({ignore_index}); if "
            "the tokenizer was extended, resize the model's embeddings."
        )


def _traced(labels: torch.Tensor) -> bool:
    """True if ``labels`` are fake or being recorded in a graph."""
    # slow to import, and not loaded unless something traces
    tracing = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return hasattr(labels, "fake_mode") or (tracing is not None and tracing.get_proxy_mode() is not None)
