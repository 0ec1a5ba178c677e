"""Lazy logits of a head: :func:`lazy_logits` makes them, :func:`added` adds those of a LoRA to them.

Between the head and the loss gradients travel as :class:`FactoredGrad`. So hooks and identity Functions that other
libraries put there keep working (ZeRO-3 wraps each module's output), and the loss keeps its graph.
"""

from __future__ import annotations

import dataclasses

import torch

from tp_plugin.errors import TensorParallelError
from tp_plugin.lazy.grad import FactoredGrad, expect_factored
from tp_plugin.lazy.logits import VocabParallelLogits
from tp_plugin.lazy.recipe import STEPS, Recipe, version_of
from tp_plugin.loss.node import compute_dtype, refuse_double_backward, refuse_transforms
from tp_plugin.loss.parts import HeadGrads, Transform, Wanted, unpack
from tp_plugin.loss.vocab import VocabShard


@torch.compiler.disable
def lazy_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    vocab: VocabShard,
    *,
    workspace_bytes: int | None = None,
) -> VocabParallelLogits:
    """``F.linear(hidden, weight, bias)`` over a sharded vocabulary, not computed yet. Not a collective call.

    The head enters the sharded region itself: the gradient of ``hidden`` is the full sum over the group, that of
    ``weight`` and ``bias`` is for this rank's rows.

    Args:
        hidden: [..., H] floating with at least one leading dimension; equal on all ranks of ``vocab.group``.
        weight: [v, H], this rank's rows, may be a Parameter; in the dtype of ``hidden`` unless under autocast.
        bias: [v] or None.
        vocab: the rows of the vocabulary on this rank.
        workspace_bytes: working memory of the loss; None is the default of ``linear_cross_entropy``.

    Returns:
        Lazy logits [..., V], in the dtype ``F.linear`` would return (the autocast dtype under autocast).

    Raises:
        TensorParallelError: shapes or dtypes that do not fit together.
    """
    bias_fits = bias is None or bias.shape == (vocab.rows,)
    if hidden.dim() < 2 or weight.shape != (vocab.rows, hidden.shape[-1]) or not bias_fits:
        shapes = tuple(hidden.shape), tuple(weight.shape), None if bias is None else tuple(bias.shape)
        raise TensorParallelError(
            f"lazy logits need hidden [..., H], weight [{vocab.rows}, H] and bias [{vocab.rows}] or None; the shapes "
            f"are {shapes}."
        )
    refuse_transforms()
    dtype = compute_dtype(hidden)
    if dtype == hidden.dtype and weight.dtype != dtype:
        raise TensorParallelError(f"hidden is {hidden.dtype} and the head's weight {weight.dtype}; make them equal.")
    STEPS.install()
    wanted = Wanted(*(x is not None and x.requires_grad for x in (hidden, weight, bias)))
    return _Make.apply(hidden, weight, bias, vocab, dtype, wanted, workspace_bytes)


def added(first: VocabParallelLogits, second: VocabParallelLogits) -> VocabParallelLogits | None:
    """The sum of two lazy logits over one vocabulary as one product ``[x, s y] [W, U]^T``; None where it is not one.

    So a head's LoRA goes through the fused loss. The joined weight is a copy. If ``U`` has a gradient, that of the
    joined copy is computed: as much work as training ``W``.
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


class _Make(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, vocab, dtype, wanted, workspace_bytes):
        ctx.set_materialize_grads(False)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        source = hidden.detach()
        recipe = Recipe(
            source.to(dtype),
            weight.detach().to(dtype),
            None if bias is None else bias.detach().to(dtype),
            vocab,
            Transform(),
            wanted,
            workspace_bytes,
            STEPS.value,
            source=(source, version_of(source)),
        )
        return VocabParallelLogits((*hidden.shape[:-1], vocab.size), dtype, recipe)

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        if grad is None:
            return (None,) * 7
        terms = expect_factored(grad).terms
        parts = zip(("hidden", "weight", "bias"), ctx.dtypes, ctx.needs_input_grad, strict=False)
        return (*(unpack(terms, part, dtype) if needed else None for part, dtype, needed in parts), *(None,) * 4)


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
