"""Numbers taken out of lazy logits without computing all of them: normalisers, single logits, the largest.

Everything here is a collective call over the vocabulary's group. What is differentiable is an autograd node whose
backward gives a :class:`FactoredGrad`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from tp_plugin.collectives import all_reduce_
from tp_plugin.lazy.grad import FactoredGrad
from tp_plugin.lazy.logits import Recipe, VocabParallelLogits
from tp_plugin.loss.functional import refuse_double_backward, restore, run
from tp_plugin.loss.implementations import block_for
from tp_plugin.loss.job import Job, Upstream, workspace_or_default
from tp_plugin.loss.parts import HeadGrads, Options, Wanted, wide_of
from tp_plugin.loss.shard_nodes import top_candidates
from tp_plugin.loss.vocab import VocabShard

PURPOSE = "values"  # under which the collectives are counted
NOWHERE = -100  # a label that counts nowhere


def job_of(recipe: Recipe, labels: torch.Tensor, options: Options) -> Job:
    """The loss of these logits, [N, V]."""
    head = recipe.head()
    block = block_for("auto", head.hidden.device, head.hidden.dtype)
    return Job(head, labels, options, None, recipe.workspace_bytes, block)


def log_z(logits: VocabParallelLogits) -> torch.Tensor:
    """``logsumexp`` over the vocabulary: [...] for logits [..., V], in ``wide_of`` their dtype."""
    logits.check_fresh()
    return _LogZ.apply(logits, torch.is_grad_enabled() and logits.requires_grad)


def selected(logits: VocabParallelLogits, ids: torch.Tensor) -> torch.Tensor:
    """The logits of the words ``ids`` [..., K], int64 global ids: [..., K], in ``wide_of`` their dtype.

    Costs ``N * K`` rows of the weight and one all-reduce of the result, and no product with the whole weight.
    """
    logits.check_fresh()
    return _Selected.apply(logits, ids)


@torch.no_grad()
def top_ids(logits: VocabParallelLogits, k: int) -> torch.Tensor:
    """Ids of the ``k`` largest logits of each row, largest first: [..., k]. Of equal ones the lowest id comes first
    for ``k`` 1, in any order else."""
    logits.check_fresh()
    recipe, lead = logits._recipe, logits.shape[:-1]
    vocab, head = recipe.vocab, recipe.head()
    found, step = [], rows_within(recipe, vocab.size)
    for start in range(0, max(1, head.hidden.shape[0]), step):
        own = own_logits(recipe, head.hidden[start : start + step], logits.dtype)
        found.append(top_candidates(own, k, vocab)[1])
    return torch.cat(found).reshape(*lead, k)


def own_logits(recipe: Recipe, hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """This rank's columns [..., v] of the logits of ``hidden`` [..., H], rounded as plain ones would be; no view."""
    with torch.autocast(hidden.device.type, enabled=False):
        own = hidden.new_empty((*hidden.shape[:-1], recipe.vocab.rows))
        flat = hidden.reshape(-1, hidden.shape[-1])
        rows = own.view(flat.shape[0], recipe.vocab.rows)
        if recipe.bias is None:
            torch.mm(flat, recipe.weight.t(), out=rows)
        else:
            torch.addmm(recipe.bias, flat, recipe.weight.t(), out=rows)
        if not recipe.transform.identity:
            own = recipe.transform.apply_(own.to(wide_of(own.dtype)))
        return own.to(dtype)


def rows_within(recipe: Recipe, columns: int) -> int:
    """How many rows of ``columns`` numbers, three copies of 8 bytes each, the working memory has room for."""
    budget = workspace_or_default(recipe.workspace_bytes, recipe.hidden.device)
    return max(1, budget // max(1, 24 * columns))


class _LogZ(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, recording):
        ctx.set_materialize_grads(False)
        recipe, rows = logits._recipe, logits.shape[:-1].numel()
        ctx.shape, ctx.dtype, ctx.device = logits.shape, logits.dtype, logits.device
        labels = torch.full((rows,), NOWHERE, device=logits.device)
        wanted = recipe.wanted if recording else Wanted(False, False, False)
        _, stats = run(ctx, job_of(recipe, labels, Options("none")), wanted)
        return stats.log_z.reshape(logits.shape[:-1])

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        if grad is None:
            return None, None
        return _factored(ctx, restore(ctx, Upstream(log_z=grad.reshape(-1)))), None


class _Selected(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ids):
        ctx.set_materialize_grads(False)
        recipe = logits._recipe
        head, wide = recipe.head(), wide_of(recipe.hidden.dtype)
        flat = ids.reshape(head.hidden.shape[0], ids.shape[-1])
        ctx.shape, ctx.dtype, ctx.device = logits.shape, logits.dtype, logits.device
        ctx.setup = recipe.vocab, recipe.transform, recipe.wanted, rows_within(recipe, head.hidden.shape[1])
        z = torch.zeros(flat.shape, dtype=wide, device=flat.device)
        with torch.autocast(logits.device.type, enabled=False):
            for rows, k, words, mine in _found(flat, recipe.vocab, ctx.setup[-1]):
                product = torch.linalg.vecdot(head.hidden[rows].to(wide), head.weight[words].to(wide))
                product = product.to(head.hidden.dtype).to(wide)  # as rounded as the products that log Z is made of
                product = product if head.bias is None else product + head.bias[words]
                z[rows, k] = torch.where(mine, product, 0.0)
        all_reduce_(z, recipe.vocab.group, purpose=PURPOSE)
        values = recipe.transform.apply_(z)
        ctx.save_for_backward(head.hidden, head.weight, flat, values if recipe.transform.tanh else None)
        return values.reshape(ids.shape).clone()

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        if grad is None:
            return None, None
        hidden, weight, flat, values = ctx.saved_tensors
        vocab, transform, wanted, step = ctx.setup
        wide = wide_of(hidden.dtype)
        g = grad.reshape(flat.shape).to(wide)
        largest = g.abs().amax() if g.numel() else g.new_ones(())
        largest = torch.where(largest > 0, largest, 1.0)  # kept apart from half precision, as everywhere
        g = g / largest if values is None else g / largest * transform.bend_(values.clone())
        d_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device) if wanted.hidden else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wanted.weight else None
        d_bias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if wanted.bias else None
        for rows, k, words, mine in _found(flat, vocab, step):
            by = g[rows, k] * mine
            if d_hidden is not None:
                d_hidden[rows] += by.unsqueeze(1) * weight[words]
            if d_weight is not None:
                d_weight.index_add_(0, words, by.unsqueeze(1) * hidden[rows])
            if d_bias is not None:
                d_bias.index_add_(0, words, by)
        if d_hidden is not None:
            d_hidden = d_hidden.to(hidden.dtype)
            all_reduce_(d_hidden, vocab.group, purpose=PURPOSE)
        return _factored(ctx, HeadGrads(d_hidden, d_weight, d_bias, largest * transform.slope)), None


def _found(flat: torch.Tensor, vocab: VocabShard, step: int) -> Iterator[tuple[slice, int, torch.Tensor, torch.Tensor]]:
    """Of ids [N, K], ``step`` rows of one k at a time: the rows, k, local ids (some row where a word is not here), and
    which are here. Nothing on a rank without words."""
    for k in range(flat.shape[1] if vocab.rows else 0):
        for start in range(0, flat.shape[0], step):
            rows = slice(start, min(start + step, flat.shape[0]))
            words = flat[rows, k] - vocab.start
            yield rows, k, words.clamp(0, vocab.rows - 1), (words >= 0) & (words < vocab.rows)


def _factored(ctx: Any, grads: HeadGrads) -> FactoredGrad:
    if grads.hidden is not None:
        hidden = grads.hidden.reshape(*ctx.shape[:-1], grads.hidden.shape[-1])
        grads = dataclasses.replace(grads, hidden=hidden)
    return FactoredGrad(ctx.shape, ctx.dtype, ctx.device, (grads,))
