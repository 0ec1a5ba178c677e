"""Sums of lazy logits: a head and its LoRA."""

from __future__ import annotations

import dataclasses

import torch

from tp_plugin.lazy.grad import FactoredGrad, expect_factored
from tp_plugin.lazy.logits import VocabParallelLogits, version_of
from tp_plugin.loss.functional import refuse_double_backward
from tp_plugin.loss.parts import HeadGrads, Wanted


def added(first: VocabParallelLogits, second: VocabParallelLogits) -> VocabParallelLogits | None:
    """The sum of two lazy logits over one vocabulary as one product, ``[x, s y] [W, U]^T``; None where it is none.

    So a head's LoRA goes through the fused loss. The joined weight is a copy, and its gradient, if ``U`` has one, is
    computed for all of it: as much work as training ``W``.
    """
    one, two = first._recipe, second._recipe
    scale = two.transform.inner
    plain = one.transform.identity and not two.transform.tanh and isinstance(scale, float) and two.bias is None
    alike = first.shape == second.shape and first.dtype == second.dtype and one.hidden.dtype == two.hidden.dtype
    if not (plain and alike) or one.normalised or two.normalised or one.vocab.sizes != two.vocab.sizes:
        return None
    for logits in (first, second):
        logits.check_fresh()
        logits.check_shared()
    hidden = torch.cat([one.hidden, two.hidden * scale], -1)
    wanted = Wanted(one.wanted.hidden or two.wanted.hidden, one.wanted.weight or two.wanted.weight, one.wanted.bias)
    weight = torch.cat([one.weight, two.weight], 1)
    joined = dataclasses.replace(one, hidden=hidden, weight=weight, wanted=wanted, source=(hidden, version_of(hidden)))
    return _Sum.apply(first, second, joined, scale)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, first, second, recipe, scale):
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.dtype, ctx.scale = first.shape, first.dtype, scale
        ctx.width = first._recipe.hidden.shape[-1]
        return VocabParallelLogits(first.shape, first.dtype, recipe)

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        if grad is None:
            return (None,) * 4
        terms = expect_factored(grad).terms
        parts = []
        for needed, columns, factor in zip(
            ctx.needs_input_grad, (slice(ctx.width), slice(ctx.width, None)), (1.0, ctx.scale), strict=False
        ):
            own = tuple(
                HeadGrads(
                    None if term.hidden is None else term.hidden[..., columns] * factor,
                    None if term.weight is None else term.weight[:, columns],
                    term.bias if columns.start is None else None,
                    term.scale,
                )
                for term in terms
            )
            parts.append(FactoredGrad(ctx.shape, ctx.dtype, grad.device, own) if needed else None)
        return (*parts, None, None)
