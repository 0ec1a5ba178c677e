"""What does not fit together is refused here: shapes, dtypes, labels, and shards that do not make a vocabulary."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist

from tp_plugin.collectives import all_gather
from tp_plugin.errors import TensorParallelError, agree
from tp_plugin.loss.vocab import VocabShard

_KNOWN: dict[
    int, tuple[weakref.ref[torch.Tensor], VocabShard]
] = {}  # by the id of the weight, checked by the reference


def vocab_of(
    weight: torch.Tensor,
    rows: int,
    group: dist.ProcessGroup | None,
    vocab_size: int | None,
    vocab: VocabShard | None,
    problem: str | None,
    has: str,
) -> VocabShard:
    """Which words the ``rows`` of ``weight`` are: ``vocab``, if given, else a collective call the first time a tensor
    is met.

    The ranks tell each other their number of rows once for each tensor object, so a parameter costs one exchange in a
    whole training, while a tensor made anew each step pays for one each step (give its ``VocabShard`` then).

    Args:
        weight: the tensor by which this rank remembers what was agreed; ranks must call with the same one alike.
        rows: words this rank holds.
        group: the ranks that hold the vocabulary together.
        vocab_size: words in all, or None if the shards say it.
        vocab: what the caller knows of it all; then nothing is exchanged.
        problem: what this rank found wrong already. On the first call with this tensor every rank raises it together;
            later, when ranks no longer wait for each other, each raises its own.
        has: "weight has 5 rows", for a message.

    Raises:
        TensorParallelError: ``problem``, or shards that do not add up to ``vocab_size``; the same on every rank.
    """
    if vocab is not None:
        if group is not None or vocab_size is not None:
            problem = "vocab says what group and vocab_size say; give either."
        elif problem is None and vocab.rows != rows:
            problem = f"this rank holds {vocab.rows} rows of the vocabulary, and {has}."
        if problem is not None:
            raise TensorParallelError(problem)
        return vocab
    if group is None and problem is None and vocab_size not in (None, rows):
        problem = f"one rank alone holds {rows} of {vocab_size} words; pass the group that holds all of them."
    known = _KNOWN.get(id(weight))
    known = known if known is not None and known[0]() is weight else None
    if problem is not None and (group is None or known is not None):
        raise TensorParallelError(problem)
    if group is None:
        return VocabShard.balanced(rows, None)
    if known is not None and known[1].rows != rows:
        raise TensorParallelError(
            f"this weight tensor had {known[1].rows} rows when the ranks told each other their shards and has {rows} "
            "now; pass a new tensor, or its VocabShard as vocab."
        )
    if known is not None and known[1].group is group and vocab_size in (None, known[1].size):
        return known[1]
    agree(problem, group)
    mine = torch.tensor([rows, -1 if vocab_size is None else vocab_size], device=weight.device)
    sizes, asked = zip(*(part.tolist() for part in all_gather(mine, group, purpose="setup")), strict=True)
    if len(set(asked)) > 1 or asked[0] not in (-1, sum(sizes)):
        given = "different sizes" if len(set(asked)) > 1 else f"vocab_size {asked[0]}"
        raise TensorParallelError(
            f"the shards of the {len(sizes)} rank(s) have {list(sizes)} rows, {sum(sizes)} in all, and the ranks were "
            f"given {given} ({list(asked)}); pass each rank its own rows and the group that holds all of them."
        )
    vocab = VocabShard.of_sizes(sizes, group)
    key = id(weight)
    _KNOWN[key] = weakref.ref(weight, lambda _: _KNOWN.pop(key, None)), vocab
    return vocab


def items_problem(num_items: Any, reduction: str) -> str | None:
    """What is wrong with a divisor of the sum where no sum is made."""
    if num_items is not None and reduction == "none":
        return "num_items divides a sum, and reduction='none' makes none; leave one of them out."
    return None


def head_problem(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    token_weights: torch.Tensor | None,
) -> str | None:
    """What is wrong with the shapes and dtypes of one rank's inputs, in a sentence."""
    if not hidden.is_floating_point() or hidden.dim() == 0 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        return (
            f"hidden [..., H] and weight [v, H] do not fit: {tuple(hidden.shape)} of {hidden.dtype}, "
            f"{tuple(weight.shape)}."
        )
    if not weight.is_floating_point() or (bias is not None and bias.shape != weight.shape[:1]):
        shape = None if bias is None else tuple(bias.shape)
        return f"weight is {tuple(weight.shape)} of {weight.dtype} and bias {shape}; they do not fit."
    if len({x.device for x in (hidden, weight, labels) if x is not None}) > 1:
        return f"hidden is on {hidden.device}, weight on {weight.device}, labels on {labels.device}; put them together."
    return rows_problem(tuple(hidden.shape[:-1]), labels, token_weights, "hidden")


def rows_problem(
    lead: tuple[int, ...], labels: torch.Tensor, token_weights: torch.Tensor | None, what: str
) -> str | None:
    """What is wrong with labels and token weights for ``what`` with leading dimensions ``lead``."""
    if labels.dtype != torch.int64:
        return f"expected int64 labels, got {labels.dtype}."
    if tuple(labels.shape) != lead:
        return f"labels {tuple(labels.shape)} are not the leading dimensions {lead} of {what}."
    if token_weights is not None and (tuple(token_weights.shape) != lead or not token_weights.is_floating_point()):
        return (
            f"token_weights {tuple(token_weights.shape)} of {token_weights.dtype} must be floating and have the "
            f"shape {lead} of the labels."
        )
    return None


def check_labels(labels: torch.Tensor, rows: int, vocab: VocabShard, ignore_index: int) -> None:
    """Refuse labels that are not words. Labels are equal on all ranks of a group, so all ranks refuse together.

    On CPU the labels are read and a TensorParallelError is raised. On other devices reading them would stall the
    host, so the check is ``torch._assert_async``: the device stops with this sentence.

    Args:
        labels: [N] integers.
        rows: N of the hidden states.
        vocab: the vocabulary.
        ignore_index: the label that is no word.

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
    if labels.device.type != "cpu":
        message = f"a label lies outside the vocabulary [0, {vocab.size}) and is not ignore_index {ignore_index}"
        torch._assert_async(~wrong.any(), message)
    elif bool(wrong.any()):
        worst = labels[wrong][0].item()
        raise TensorParallelError(
            f"label {worst} lies outside the vocabulary [0, {vocab.size}) and is not ignore_index ({ignore_index}); "
            "was the tokenizer extended without resizing the model's embeddings?"
        )
