"""The autograd nodes of :mod:`tp_plugin.loss.shards`, over logits [..., v] that exist and are not changed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tp_plugin.collectives import all_gather, all_reduce_, start_all_gather
from tp_plugin.loss.block import Asked, Coefficients, Targets, TorchBlock, merge
from tp_plugin.loss.node import refuse_double_backward
from tp_plugin.loss.parts import Transform, as_rows, wide_of
from tp_plugin.loss.products import PURPOSE
from tp_plugin.loss.vocab import VocabShard

MASKED = torch.finfo(torch.float64).min  # stands for a logit of -inf among candidates
ROWS_BYTES = 64 << 20  # memory of a block in float32 (float64)


class Rows(torch.autograd.Function):
    """Target logit, entropy, log Z, mean logit and largest word of each row; the logits are not changed."""

    @staticmethod
    def forward(ctx, logits, labels, valid, vocab, with_mean, with_top):
        ctx.set_materialize_grads(False)
        ctx.vocab, ctx.asked = vocab, Asked(logit_sum=with_mean, entropy=True, top_id=with_top)
        flat, y, counted = as_rows(logits.detach()), labels.reshape(-1), valid.reshape(-1)
        own = torch.empty(len(ctx.asked.names), flat.shape[0], dtype=wide_of(logits.dtype), device=logits.device)
        for rows in _slices(flat):
            own[:, rows] = _block(flat[rows], y[rows], counted[rows], vocab, ctx.asked).statistics()
        stats = merge(start_all_gather(own, vocab.group, purpose=PURPOSE)(), ctx.asked)
        ctx.save_for_backward(flat, y, counted, stats.log_z, stats.entropy)
        ctx.shape = logits.shape
        assert stats.entropy is not None
        mean = None if stats.logit_sum is None else (stats.logit_sum / vocab.size).reshape(labels.shape)
        top_id = None
        if stats.top_id is not None:
            top_id = stats.top_id.reshape(labels.shape).long()
            ctx.mark_non_differentiable(top_id)
        return *(x.reshape(labels.shape) for x in (stats.target, stats.entropy, stats.log_z)), mean, top_id

    @staticmethod
    def backward(ctx, target, entropy, log_z, mean, _):
        refuse_double_backward()
        flat, labels, valid, row_log_z, row_entropy = ctx.saved_tensors
        given = [None if g is None else g.reshape(-1).to(row_log_z.dtype) for g in (target, entropy, log_z, mean)]
        zero = torch.zeros_like(row_log_z)
        by = Coefficients(
            softmax=zero if given[2] is None else given[2],
            target=zero if given[0] is None else -given[0],
            uniform=None if given[3] is None else given[3] * (-1.0 / ctx.vocab.size),
            entropy=given[1],
        )
        grad = torch.empty_like(flat, memory_format=torch.contiguous_format)
        for rows in _slices(flat):
            block = _block(flat[rows], labels[rows], valid[rows], ctx.vocab, ctx.asked)
            grad[rows] = block.gradient_(row_log_z[rows], row_entropy[rows], by[rows])
        return grad.reshape(ctx.shape), None, None, None, None, None


class Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, vocab, logarithm):
        ctx.vocab, ctx.logarithm = vocab, logarithm
        flat = as_rows(logits.detach())
        no_labels, asked = torch.zeros(flat.shape[0], dtype=torch.int64, device=flat.device), Asked()
        own = torch.empty(len(asked.names), flat.shape[0], dtype=wide_of(flat.dtype), device=flat.device)
        for rows in _slices(flat):
            own[:, rows] = _block(flat[rows], no_labels[rows], no_labels[rows] > 0, vocab, asked).statistics()
        log_z = merge(start_all_gather(own, vocab.group, purpose=PURPOSE)(), asked).log_z.unsqueeze(1)
        out = torch.empty_like(flat, memory_format=torch.contiguous_format)
        for rows in _slices(flat):
            logs = flat[rows].to(log_z.dtype) - log_z[rows]
            out[rows] = logs if logarithm else logs.exp_()
        ctx.save_for_backward(out)
        return out.reshape(logits.shape)

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        (out,) = ctx.saved_tensors
        flat, wide = grad.reshape(out.shape), wide_of(out.dtype)
        sums = torch.zeros(out.shape[0], 1, dtype=wide, device=out.device)
        for rows in _slices(flat):
            weighted = flat[rows].to(wide) if ctx.logarithm else flat[rows].to(wide) * out[rows]
            sums[rows] = weighted.sum(1, keepdim=True)
        all_reduce_(sums, ctx.vocab.group, purpose=PURPOSE)
        back = torch.empty_like(out)
        for rows in _slices(flat):
            values = out[rows].to(wide)
            if ctx.logarithm:
                back[rows] = flat[rows] - values.exp_() * sums[rows]
            else:
                back[rows] = values * (flat[rows] - sums[rows])
        return back.reshape(grad.shape), None, None


class TopKOfShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, k, vocab):
        values, ids = top_candidates(as_rows(logits.detach()), k, vocab)
        ctx.vocab, ctx.shape = vocab, logits.shape
        ctx.save_for_backward(ids)
        values, ids = (x.reshape(*logits.shape[:-1], k) for x in (values, ids))
        ctx.mark_non_differentiable(ids)
        return values, ids

    @staticmethod
    def backward(ctx, grad, _):
        refuse_double_backward()
        (ids,) = ctx.saved_tensors
        local, rows = ids - ctx.vocab.start, ctx.vocab.rows
        mine = (local >= 0) & (local < rows)
        back = grad.new_zeros(ids.shape[0], rows)
        if rows:
            back.scatter_add_(1, local.clamp(0, rows - 1), torch.where(mine, grad.reshape(ids.shape), 0.0))
        return back.reshape(ctx.shape), None, None


def _block(
    logits: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor, vocab: VocabShard, asked: Asked
) -> TorchBlock:
    wide = logits.to(wide_of(logits.dtype), copy=True)
    return TorchBlock(wide, Targets(labels, valid, vocab.start), logits.dtype, Transform(), asked)


def _slices(flat: torch.Tensor) -> Iterator[slice]:
    """Slices of rows, twice whose copy in float32 (float64) takes ``ROWS_BYTES``."""
    step = max(1, ROWS_BYTES // max(1, 2 * flat.shape[1] * wide_of(flat.dtype).itemsize))
    for start in range(0, flat.shape[0], step):
        yield slice(start, min(start + step, flat.shape[0]))


def top_candidates(own: torch.Tensor, k: int, vocab: VocabShard) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` largest of full rows, values [N, k] and global ids, from this rank's logits ``own`` [N, v]."""
    n = min(k, vocab.rows)
    # float64 represents all ids and the values of all floating dtypes, so that one all-gather is enough
    packed = torch.zeros((2, own.shape[0], k), dtype=torch.float64, device=own.device)
    packed[0] = float("-inf")  # below all words, even those masked by -inf
    if n:
        values, ids = own.max(1, keepdim=True) if n == 1 else own.topk(n, dim=1)
        packed[0, :, :n], packed[1, :, :n] = values.double().clamp(min=MASKED), ids + vocab.start
    values, ids = torch.cat(all_gather(packed, vocab.group, purpose=PURPOSE), 2).unbind(0)
    order = values.argmax(1, keepdim=True) if k == 1 else values.topk(k, dim=1).indices
    values = values.gather(1, order)
    return values.masked_fill(values == MASKED, float("-inf")).to(own.dtype), ids.gather(1, order).long()
