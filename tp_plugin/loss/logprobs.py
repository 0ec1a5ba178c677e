"""What is known of each token's next-word distribution without holding the logits: :func:`linear_logprobs`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from tp_plugin.errors import NO_FULLGRAPH, TensorParallelError
from tp_plugin.loss.checks import check_labels, head_problem, vocab_of
from tp_plugin.loss.functional import compute_dtype, refuse_double_backward, restore, run
from tp_plugin.loss.implementations import block_for
from tp_plugin.loss.job import MORE, Job, Upstream
from tp_plugin.loss.parts import Head, Options, Transform, Wanted, unpack
from tp_plugin.loss.vocab import VocabShard

_EXACT = {torch.float32: 1 << 24, torch.float64: 1 << 53}  # up to which ids survive in the statistics' dtype


class Logprobs(NamedTuple):
    """Each of the shape of the labels, in float32 (float64 for float64), ``top_id`` in int64; None where not asked for.

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
) -> Logprobs:
    """Log-probabilities of labels under ``softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``.

    One pass over the logits, a chunk of rows at a time, and a second one in the backward. A collective call over the
    group: an all-gather of a few numbers a row each chunk, and one all-reduce of the hidden gradient in the backward.

    Args:
        more: further statistics, of ``entropy``, ``mean_logit``, ``log_square_sum`` and ``top_id``; each is one more
            number a row on the wire.

    The other arguments are those of :func:`~tp_plugin.loss.linear_cross_entropy`.

    Raises:
        TensorParallelError: shapes, dtypes or names that do not fit; labels that are not words; an ``impl`` that cannot
            run here, or ``"reference"``; a second derivative.
    """
    problem = head_problem(hidden, weight, bias, labels, None)
    unknown = sorted(set(more) - set(MORE))
    if problem is None and unknown:
        problem = f"there is no statistic {unknown[0]!r}; choose from {', '.join(MORE)}."
    rows = weight.shape[0] if weight.dim() else 0
    vocab = vocab_of(weight, rows, group, vocab_size, vocab, problem, f"weight has {rows}")
    if problem is not None:
        raise TensorParallelError(problem)
    dtype = compute_dtype(hidden)
    block = block_for(impl, hidden.device, dtype)
    if block is None:
        raise TensorParallelError(f"linear_logprobs has no impl={impl!r}; use 'auto', 'chunked' or 'triton'.")
    lead, flat, labels = labels.shape, hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    check_labels(labels, flat.shape[0], vocab, ignore_index)
    how = ignore_index, vocab, Transform.of(scale, softcap), workspace_bytes, block, tuple(more)
    found = _Logprobs.apply(flat, weight, bias, labels, how, torch.is_grad_enabled())
    given = dict(zip(("logprobs", *more), (x.reshape(lead) for x in found), strict=True))
    if "top_id" in given:
        if vocab.size > _EXACT[given["top_id"].dtype]:
            raise TensorParallelError(f"a vocabulary of {vocab.size} has ids that {dtype} statistics cannot hold.")
        given["top_id"] = given["top_id"].long()
    return Logprobs(*(given.get(name) for name in Logprobs._fields))  # type: ignore[arg-type]


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, how, recording):
        ctx.set_materialize_grads(False)
        ignore_index, vocab, transform, workspace_bytes, block, more = how
        dtype = compute_dtype(hidden)
        bias_values = None if bias is None else bias.detach()
        head = Head(hidden.detach().to(dtype), weight.detach().to(dtype), bias_values, vocab, transform)
        job = Job(head, labels, Options("none", ignore_index), None, workspace_bytes, block)
        ctx.dtypes, ctx.more = [None if x is None else x.dtype for x in (hidden, weight, bias)], more
        wanted = Wanted(*ctx.needs_input_grad[:3]) if recording else Wanted(False, False, False)
        _, stats = run(ctx, job, wanted, more=more)
        found = stats.logprobs, *(getattr(stats, name) for name in more)
        ctx.mark_non_differentiable(*(x for name, x in zip(more, found[1:], strict=True) if name != "entropy"))
        return found

    @staticmethod
    def backward(ctx, logprobs, *more):
        refuse_double_backward()
        entropy = dict(zip(ctx.more, more, strict=True)).get("entropy")
        if logprobs is None and entropy is None:
            return (None,) * 6
        grads = dataclasses.replace(restore(ctx, Upstream(logprobs=logprobs, entropy=entropy)), fresh=True)
        parts = zip(("hidden", "weight", "bias"), ctx.dtypes, strict=True)
        return (*(unpack([grads], part, dtype) for part, dtype in parts), *(None,) * 3)
