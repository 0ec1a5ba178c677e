"""The autograd node of a head with its loss, and the forward, backward and refusals that all nodes over a Job share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from tp_plugin.errors import TensorParallelError
from tp_plugin.loss import chunked
from tp_plugin.loss.job import MORE, UPSTREAM, Goal, Job, Setup, TokenStats, Upstream
from tp_plugin.loss.parts import HeadGrads, Wanted, unpack


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The dtype in which ``F.linear`` would multiply ``hidden`` here: the autocast dtype under autocast."""
    kind = hidden.device.type
    if not torch.amp.is_autocast_available(kind):
        return hidden.dtype
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def refuse_double_backward() -> None:
    """Raise inside a backward that is itself being recorded."""
    if torch.is_grad_enabled():
        raise TensorParallelError(
            "logits of a sharded vocabulary and fused cross entropy have no second derivative "
            "(create_graph=True); use tp_plugin.loss.linear_cross_entropy(hidden, lm_head.weight, labels, "
            'impl="reference").'
        )


def refuse_transforms(allowed: bool = False) -> None:
    """Raise inside a transform of ``torch.func``, unless ``allowed``."""
    if not allowed and torch._C._are_functorch_transforms_active():
        raise TensorParallelError(
            "transforms of torch.func (grad, vmap, jvp) cannot pass through the fused cross entropy. Use "
            'torch.autograd, or on one rank linear_cross_entropy(..., impl="reference").'
        )


def run(
    ctx: Any, job: Job, wanted: Wanted, *, stats: bool = False, more: Sequence[str] = (), recompute: bool = False
) -> tuple[torch.Tensor, TokenStats]:
    """The forward of an autograd node over ``job``; ``ctx`` keeps all that :func:`restore` needs.

    Args:
        ctx: of the node.
        wanted: the gradients that the backward will be asked for.
        stats: the statistics of a scalar loss have gradients.
        more: the statistics of ``job.MORE`` that are collected too.
        recompute: keep no gradients of a scalar loss, only the tensors that they are computed from.
    """
    scalar, head = job.options.reduction != "none", job.head
    ctx.setup, ctx.wanted, ctx.direct = job.setup, wanted, scalar and bool(wanted) and not recompute
    if scalar:
        loss, grads, found = chunked.scalar_loss(job, wanted if ctx.direct else None, more)
    else:
        grads, found = None, chunked.token_stats(job, more)
        loss = found.losses if job.goal.token_weights is None else found.losses * job.weights
    made = (None,) * 5 if grads is None else (*grads.tensors, job.counted.any())
    again: tuple = (None,) * 10
    if wanted and (stats or not ctx.direct):
        again = head.hidden, head.weight, head.bias, *job.goal.tensors, found.log_z, found.entropy, found.mass
    ctx.save_for_backward(*made, *again)
    return loss, found


def restore(ctx: Any, upstream: Upstream) -> HeadGrads:
    """The gradients of a node whose forward was :func:`run`.

    A collective call, one all-reduce, unless they were made in the forward already.
    """
    hidden, weight, bias, scale, any_counted, *again = ctx.saved_tensors
    if ctx.direct and upstream.alone and upstream.losses is not None:
        return HeadGrads(hidden, weight, bias, scale).scaled(torch.where(any_counted, upstream.losses, 0.0))
    hidden, weight, bias, *goal, log_z, entropy, mass = again
    job = ctx.setup.job(hidden, weight, bias, Goal(*goal))
    losses = upstream.losses
    if losses is not None:
        losses = torch.where(job.counted, losses.to(job.head.wide), 0.0) * job.weights
        if job.options.reduction == "mean":
            losses = losses / job.safe_divisor
    return chunked.token_grads(job, log_z, entropy, mass, dataclasses.replace(upstream, losses=losses), ctx.wanted)


def fused_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    goal: Goal,
    setup: Setup,
    names: Sequence[str],
    recompute: bool = False,
) -> dict[str, torch.Tensor]:
    """Results by name, differentiable by ``hidden`` [N, H], ``weight`` [v, H] and ``bias`` [v]. A collective call.

    Args:
        names: ``"losses"`` (a scalar unless the reduction is ``"none"``) and other fields of ``TokenStats``.
        recompute: as for :func:`run`.
    """
    found = _FusedHead.apply(hidden, weight, bias, goal, setup, tuple(names), recompute, torch.is_grad_enabled())
    return dict(zip(names, found, strict=True))


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, goal, setup, names, recompute, recording):
        ctx.set_materialize_grads(False)
        ctx.names, ctx.dtypes = names, [None if x is None else x.dtype for x in (hidden, weight, bias)]
        dtype = compute_dtype(hidden)
        bias_values = None if bias is None else bias.detach()
        job = setup.job(hidden.detach().to(dtype), weight.detach().to(dtype), bias_values, goal)
        wanted = Wanted(*ctx.needs_input_grad[:3]) if recording else Wanted(False, False, False)
        more = [name for name in names if name in MORE]
        loss, stats = run(ctx, job, wanted, stats=len(names) > 1, more=more, recompute=recompute)
        found = {name: loss if name == "losses" else getattr(stats, name) for name in names}
        if "top_id" in found:
            found["top_id"] = found["top_id"].long()
        ctx.mark_non_differentiable(*(x for name, x in found.items() if name not in UPSTREAM))
        return tuple(found.values())

    @staticmethod
    def backward(ctx, *grads):
        refuse_double_backward()
        given = dict(zip(ctx.names, grads, strict=True))
        upstream = Upstream(*(given.get(name) for name in UPSTREAM))
        if all(given.get(name) is None for name in UPSTREAM):
            return (None,) * 8
        found = dataclasses.replace(restore(ctx, upstream), fresh=not ctx.direct)
        parts = zip(("hidden", "weight", "bias"), ctx.dtypes, strict=True)
        return (*(unpack([found], part, dtype) for part, dtype in parts), *(None,) * 5)
