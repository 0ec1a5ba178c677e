"""Operations that are computed from the shards: the loss, normalisers, single logits, the largest words.

Log-probabilities are differences of logits, so these logits are not rounded to half precision here. All are collective
calls over the vocabulary's group. The differentiable ones are autograd nodes whose backward makes a
:class:`FactoredGrad`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tp_plugin.collectives import all_reduce_
from tp_plugin.lazy.dispatch import answers, autocast_widens
from tp_plugin.lazy.grad import FactoredGrad
from tp_plugin.lazy.logits import VocabParallelLogits, unnormalised
from tp_plugin.loss.job import Goal, Upstream
from tp_plugin.loss.node import refuse_double_backward, restore, run
from tp_plugin.loss.parts import HeadGrads, Options, Wanted, wide_of
from tp_plugin.loss.shard_nodes import top_candidates
from tp_plugin.loss.vocab import VocabShard

PURPOSE = "values"  # of the collectives, for their counters

NO_LABEL = -100
FEW = 64  # words a row that are selected one by one; for more the logits are computed


@answers(F.cross_entropy)
def _cross_entropy(func, logits, args, kwargs):
    names = ("target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
    given = dict(zip(names, args, strict=False)) | kwargs
    target, weight = given.pop("target", None), given.pop("weight", None)
    plain = all(given.pop(name, None) is None for name in ("size_average", "reduce"))
    if not (plain and logits.dim() == 2 and given.get("reduction", "mean") in ("mean", "sum", "none")):
        return NotImplemented  # the (N, V, d1, ...) form, torch's own errors
    if type(target) is not Tensor or not 0.0 <= given.get("label_smoothing", 0.0) <= 1.0:
        return NotImplemented
    indices = target.dtype in (torch.int64, torch.uint8) and target.shape == logits.shape[:1]
    probable = func is F.cross_entropy and target.shape == logits.shape and given.get("ignore_index", -100) < 0
    if not indices and not (probable and _constant(target, logits)):
        return NotImplemented
    if weight is not None and not (weight.shape == logits.shape[1:] and _constant(weight, logits)):
        return NotImplemented
    if logits._recipe.normalised:  # a softmax leaves log-probabilities as they are
        logits = unnormalised(logits)
    return fused_cross_entropy(logits, target, Options(**given), weight)


def _constant(x, logits):
    """True if torch would multiply the logits by ``x`` and the loss gives it no gradient."""
    alike = x.dtype == logits.dtype or (x.is_floating_point() and torch.is_autocast_enabled(logits.device.type))
    return type(x) is Tensor and alike and x.device == logits.device and not x.requires_grad


@answers(F.nll_loss)
def _nll_loss(func, logits, args, kwargs):
    """Of log-probabilities that are lazy: the cross entropy."""
    return _cross_entropy(func, logits, args, kwargs) if logits._recipe.normalised else NotImplemented


def _dim(logits, args, kwargs, *names):
    """The arguments by name, if ``dim`` is the last dimension; else None."""
    given = dict(zip(names, args, strict=False)) | kwargs
    dim = given.pop("dim", None)
    dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    last = isinstance(dim, int) and dim in (-1, logits.dim() - 1)
    return given if last and len(args) <= len(names) else None


def _kept(x, keepdim):
    return x if keepdim else x.squeeze(-1)


@answers(torch.logsumexp, Tensor.logsumexp)
def _logsumexp(func, logits, args, kwargs):
    given = _dim(logits, args, kwargs, "dim", "keepdim")
    if given is None or logits._recipe.normalised or set(given) - {"keepdim"}:
        return NotImplemented
    dtype = torch.float32 if autocast_widens(logits) else logits.dtype
    return _kept(log_z(logits).unsqueeze(-1), given.get("keepdim", False)).to(dtype)


@answers(torch.gather, Tensor.gather)
def _gather(func, logits, args, kwargs):
    given = _dim(logits, args, kwargs, "dim", "index")
    index = None if given is None else given.get("index")
    if type(index) is not Tensor or set(given) - {"index", "sparse_grad"} or index.dtype != torch.int64:
        return NotImplemented
    if index.shape[:-1] != logits.shape[:-1] or not 0 < index.shape[-1] <= FEW or index.device != logits.device:
        return NotImplemented
    inside = (index >= 0) & (index < logits.shape[-1])
    if index.device.type != "cpu":
        torch._assert_async(inside.all(), "an index of gather is outside the vocabulary")
    elif not inside.all():
        return NotImplemented  # for torch's own error
    if not logits._recipe.normalised:
        return selected(logits, index).to(logits.dtype)
    raw = unnormalised(logits)
    return (selected(raw, index) - log_z(raw).unsqueeze(-1)).to(logits.dtype)


@answers(torch.argmax, Tensor.argmax)
def _argmax(func, logits, args, kwargs):
    given = _dim(logits, args, kwargs, "dim", "keepdim")
    if given is None or set(given) - {"keepdim"}:
        return NotImplemented
    return _kept(top_ids(logits, 1), given.get("keepdim", False))


@answers(torch.max, Tensor.max)
def _max(func, logits, args, kwargs):
    given = _dim(logits, args, kwargs, "dim", "keepdim")
    if given is None or set(given) - {"keepdim"}:
        return NotImplemented
    ids = top_ids(logits, 1)
    keep = given.get("keepdim", False)
    return torch.return_types.max((_kept(_gather(func, logits, (-1, ids), {}), keep), _kept(ids, keep)))


@answers(torch.topk, Tensor.topk)
def _topk(func, logits, args, kwargs):
    given = dict(zip(("k", "dim", "largest", "sorted"), args, strict=False)) | kwargs
    k, last = given.pop("k", None), given.pop("dim", -1) in (-1, logits.dim() - 1)
    if not (type(k) is int and last and given.pop("largest", True)) or set(given) - {"sorted"}:
        return NotImplemented
    if not 0 < k <= min(FEW, logits.shape[-1]):
        return NotImplemented
    ids = top_ids(logits, k)
    return torch.return_types.topk((_gather(Tensor.gather, logits, (-1, ids), {}), ids))


def fused_cross_entropy(
    logits: VocabParallelLogits, labels: torch.Tensor, options: Options, class_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """The fused loss of [N, V] lazy logits and [N] integer labels or [N, V] probabilities. A collective call.

    Returns:
        What ``F.cross_entropy`` returns, in the dtype of the logits (float32 under autocast).
    """
    logits.check_fresh()
    recipe = logits._recipe
    goal = Goal.of(labels, class_weights, None, recipe.head().hidden, recipe.vocab, options.ignore_index)
    narrow = logits.dtype.itemsize < 4 and torch.is_autocast_enabled(logits.device.type)
    dtype = torch.float32 if narrow else logits.dtype
    return _CrossEntropy.apply(logits, goal, options, dtype, torch.is_grad_enabled() and logits.requires_grad)


def log_z(logits: VocabParallelLogits) -> torch.Tensor:
    """``logsumexp`` over the vocabulary: [...] for logits [..., V], in ``wide_of`` their dtype."""
    logits.check_fresh()
    return _LogZ.apply(logits, torch.is_grad_enabled() and logits.requires_grad)


def selected(logits: VocabParallelLogits, ids: torch.Tensor) -> torch.Tensor:
    """The logits of the words ``ids`` [..., K], int64 global ids: [..., K], in ``wide_of`` their dtype.

    Costs ``N * K`` rows of the weight and one all-reduce of the result, and no product with the full weight.
    """
    logits.check_fresh()
    return _Selected.apply(logits, ids)


@torch.no_grad()
def top_ids(logits: VocabParallelLogits, k: int) -> torch.Tensor:
    """Ids of the ``k`` largest logits of each row, largest first: [..., k].

    Of equal logits the lowest id comes first for ``k`` 1; the order is undefined for other ``k``.
    """
    logits.check_fresh()
    recipe, lead = logits._recipe, logits.shape[:-1]
    vocab, head = recipe.vocab, recipe.head()
    found, step = [], recipe.rows_within(vocab.size)
    for start in range(0, max(1, head.hidden.shape[0]), step):
        own = recipe.own_logits(head.hidden[start : start + step], logits.dtype)
        found.append(top_candidates(own, k, vocab)[1])
    return torch.cat(found).reshape(*lead, k)


class _LogZ(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, recording):
        ctx.set_materialize_grads(False)
        recipe, rows = logits._recipe, logits.shape[:-1].numel()
        ctx.shape, ctx.dtype, ctx.device = logits.shape, logits.dtype, logits.device
        labels = torch.full((rows,), NO_LABEL, device=logits.device)
        wanted = recipe.wanted if recording else Wanted(False, False, False)
        _, stats = run(ctx, recipe.job(Goal(labels), Options("none"), exact=True), wanted)
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
        ctx.setup = recipe.vocab, recipe.transform, recipe.wanted, recipe.rows_within(head.hidden.shape[1])
        z = torch.zeros(flat.shape, dtype=wide, device=flat.device)
        with torch.autocast(logits.device.type, enabled=False):
            for rows, k, words, mine in _found(flat, recipe.vocab, ctx.setup[-1]):
                product = torch.linalg.vecdot(head.hidden[rows].to(wide), head.weight[words].to(wide))
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
        largest = torch.where(largest > 0, largest, 1.0)  # kept apart: half precision may not represent it
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
    """Of ids [N, K], ``step`` rows of one k at a time: the rows, k, local ids, and a mask of this rank's words.

    A word of another rank gets some local id. A rank without words yields nothing.
    """
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


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, goal, options, dtype, recording):
        ctx.set_materialize_grads(False)
        recipe = logits._recipe
        ctx.shape, ctx.dtype, ctx.device = logits.shape, logits.dtype, logits.device
        wanted = recipe.wanted if recording else Wanted(False, False, False)
        return run(ctx, recipe.job(goal, options), wanted)[0].to(dtype)

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        if grad is None:
            return (None,) * 5
        grads = restore(ctx, Upstream(losses=grad))
        return FactoredGrad(ctx.shape, ctx.dtype, ctx.device, (grads,)), None, None, None, None
