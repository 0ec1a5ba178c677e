"""The autograd nodes of lazy logits: from the head to the lazy tensor, from step to step, to the loss or the values.

Between the head and the loss gradients travel as :class:`FactoredGrad`, so hooks and identity Functions that other
libraries put there (ZeRO-3 wraps every module's output) keep working and the loss keeps its graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from tp_plugin.collectives import all_gather, all_reduce_
from tp_plugin.errors import TensorParallelError
from tp_plugin.lazy import stamp
from tp_plugin.lazy.grad import FactoredGrad, expect_factored
from tp_plugin.lazy.logits import Family, Recipe, VocabParallelLogits, version_of
from tp_plugin.lazy.values import job_of, own_logits
from tp_plugin.loss.checks import check_labels
from tp_plugin.loss.functional import compute_dtype, refuse_double_backward, restore, run
from tp_plugin.loss.job import Upstream
from tp_plugin.loss.parts import HeadGrads, Options, Transform, Wanted, unpack, wide_of
from tp_plugin.loss.vocab import VocabShard

PURPOSE = "logits"  # under which the collectives of computing all logits are counted
Pull = Callable[[torch.Tensor], torch.Tensor]  # from a hidden gradient to that of the tensor it was taken from


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

    The head is its own door into the sharded region: the gradient of ``hidden`` is the full sum over the group, that
    of ``weight`` and ``bias`` is for this rank's rows.

    Args:
        hidden: [..., H] floating with at least one leading dimension; equal on all ranks of ``vocab.group``.
        weight: [v, H], this rank's rows, may be a Parameter; in the dtype of ``hidden`` unless under autocast.
        bias: [v] or None.
        vocab: which rows of the vocabulary this rank holds.
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
    dtype = compute_dtype(hidden)
    if dtype == hidden.dtype and weight.dtype != dtype:
        raise TensorParallelError(f"hidden is {hidden.dtype} and the head's weight {weight.dtype}; make them equal.")
    stamp.install()
    wanted = Wanted(*(x is not None and x.requires_grad for x in (hidden, weight, bias)))
    return _Make.apply(hidden, weight, bias, vocab, dtype, wanted, workspace_bytes)


def step(
    logits: VocabParallelLogits,
    recipe: Recipe,
    shape: Sequence[int],
    dtype: torch.dtype,
    family: Family,
    pull: Pull | None = None,
) -> VocabParallelLogits:
    """Lazy logits made from lazy logits; ``pull`` takes hidden gradients back, None leaves them as they are."""
    return _Step.apply(logits, recipe, tuple(shape), dtype, family, pull)


def unnormalised(logits: VocabParallelLogits) -> VocabParallelLogits:
    """Lazy logits of which ``logits`` are the log-probabilities. A gradient by the one is a gradient by the other."""
    recipe = dataclasses.replace(logits._recipe, normalised=False)
    return step(logits, recipe, logits.shape, logits.dtype, Family())


def autocast_widens(logits: VocabParallelLogits) -> bool:
    """Whether autocast makes ``logsumexp`` and ``log_softmax`` of these float32, which it does on accelerators only."""
    kind = logits.device.type
    return kind != "cpu" and torch.is_autocast_enabled(kind) and logits.dtype.itemsize < 4


def cross_entropy(logits: VocabParallelLogits, labels: torch.Tensor, options: Options) -> torch.Tensor:
    """The fused loss of [N, V] lazy logits and [N] int64 labels. A collective call.

    Returns:
        What ``F.cross_entropy`` returns, in the dtype of the logits (float32 under autocast).
    """
    logits.check_fresh()
    check_labels(labels, logits.shape[0], logits._recipe.vocab, options.ignore_index)
    narrow = logits.dtype.itemsize < 4 and torch.is_autocast_enabled(logits.device.type)
    dtype = torch.float32 if narrow else logits.dtype
    return _CrossEntropy.apply(logits, labels, options, dtype, torch.is_grad_enabled() and logits.requires_grad)


def dense(logits: VocabParallelLogits) -> torch.Tensor:
    """The values of lazy logits, tracked by autograd even under ``no_grad``, as a computed tensor would be."""
    logits.check_shared()
    if logits._full is not None and logits._tracked:
        return logits._full
    logits.check_fresh()
    record = logits.requires_grad and not torch.is_inference_mode_enabled()
    with torch.set_grad_enabled(record):
        if logits._full is None and logits._recipe.normalised:
            # a copy: log_softmax keeps its result for its backward, and this one may be changed in place
            return F.log_softmax(_Materialise.apply(unnormalised(logits)), -1).clone()
        return _Materialise.apply(logits) if logits._full is None else _Unwrap.apply(logits)


def adopt(logits: VocabParallelLogits, full: torch.Tensor, version: int) -> None:
    """Turn ``logits`` into ``full``, which was changed in place or of which a view was given out.

    Args:
        logits: what ``full`` was computed from, or which already is ``full``.
        full: tracked by autograd.
        version: in-place version of ``full`` when it was computed.
    """
    if logits._full is not full:
        logits._full, logits._tracked, logits._followed = full, True, version
        logits._family.computed.append((full, version))
        _become(logits)
    follow(logits)


def follow(logits: VocabParallelLogits) -> None:
    """Let the autograd history of computed logits catch up with changes made to ``_full``, perhaps through a view."""
    full = logits._full
    if full is not None and logits._tracked and version_of(full) != logits._followed and torch.is_grad_enabled():
        _become(logits)


def _become(logits: VocabParallelLogits) -> None:
    full = logits._full
    assert full is not None
    if full.requires_grad and not torch.is_inference_mode_enabled():
        try:
            with torch.enable_grad(), torch._C.DisableTorchFunctionSubclass():
                _Become.apply(logits, full)
        except RuntimeError as failure:
            raise TensorParallelError(
                "these logits came out of an autograd Function and cannot be changed in place; clone() them before, "
                "or call logits.materialize()."
            ) from failure
    logits._followed = version_of(full)


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
            stamp.current(),
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


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, recipe, shape, dtype, family, pull):
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.dtype, ctx.pull = logits.shape, logits.dtype, pull
        return VocabParallelLogits(shape, dtype, recipe, family)

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        back = None if grad is None else expect_factored(grad).relabelled(ctx.shape, ctx.dtype, ctx.pull)
        return back, None, None, None, None, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, options, dtype, recording):
        ctx.set_materialize_grads(False)
        recipe = logits._recipe
        ctx.shape, ctx.dtype, ctx.device = logits.shape, logits.dtype, logits.device
        wanted = recipe.wanted if recording else Wanted(False, False, False)
        return run(ctx, job_of(recipe, labels, options), wanted)[0].to(dtype)

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        if grad is None:
            return (None,) * 5
        grads = restore(ctx, Upstream(losses=grad))
        return FactoredGrad(ctx.shape, ctx.dtype, ctx.device, (grads,)), None, None, None, None


class _Materialise(torch.autograd.Function):
    """The full logits. In backward the gradient of the full logits, equal on all ranks, becomes a factored one."""

    @staticmethod
    def forward(ctx, logits):
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.dtype, ctx.device = logits.shape, logits.dtype, logits.device
        ctx.recipe = logits._recipe
        recipe = logits._recipe
        ctx.save_for_backward(recipe.hidden, recipe.weight, recipe.bias)
        own = own_logits(recipe, recipe.hidden, logits.dtype)  # no view: it may be changed in place
        last = own.dim() - 1
        parts = all_gather(own, recipe.vocab.group, purpose=PURPOSE, sizes=recipe.vocab.sizes, dim=last)
        return parts[0] if len(parts) == 1 else torch.cat(parts, last)

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        if grad is None:
            return None
        recipe, vocab, transform = ctx.recipe, ctx.recipe.vocab, ctx.recipe.transform
        wanted, lead = recipe.wanted, recipe.hidden.shape
        hidden, weight, bias = ctx.saved_tensors
        hidden = hidden.reshape(-1, hidden.shape[-1])
        with torch.autocast(grad.device.type, enabled=False):
            wide = wide_of(hidden.dtype)
            largest = torch.ones((), dtype=wide, device=grad.device)
            d = grad.reshape(-1, vocab.size)[:, vocab.start : vocab.stop].to(wide)
            if hidden.dtype == torch.float16 and grad.numel():  # a loss scale overflows half precision: keep it apart
                largest = grad.abs().amax().to(wide)
                largest = torch.where(largest > 0, largest, 1.0)
                d = d / largest
            if transform.tanh:
                own = F.linear(hidden, weight, bias).to(wide)
                d = d * transform.bend_(transform.apply_(own))
            d = d.to(hidden.dtype)
            d_hidden = d @ weight if wanted.hidden else None
            exact = wide if hidden.dtype == torch.float16 else hidden.dtype  # a sum over tokens can overflow float16
            if d_hidden is not None:
                all_reduce_(d_hidden, vocab.group, purpose=PURPOSE)
            term = HeadGrads(
                None if d_hidden is None else d_hidden.reshape(lead),
                d.to(exact).t() @ hidden.to(exact) if wanted.weight else None,
                d.sum(0, dtype=wide) if wanted.bias else None,
                largest * transform.slope,
            )
        return FactoredGrad(ctx.shape, ctx.dtype, ctx.device, (term,))


class _Become(torch.autograd.Function):
    """Makes lazy logits, changed in place, a child of the full tensor they have become."""

    @staticmethod
    def forward(ctx, logits, full):
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx, grad):
        return None, grad


class _Unwrap(torch.autograd.Function):
    """A copy of values that autograd follows only through the lazy tensor that holds them."""

    @staticmethod
    def forward(ctx, logits):
        ctx.set_materialize_grads(False)
        return logits._full.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


__all__ = ["adopt", "cross_entropy", "dense", "lazy_logits", "step", "version_of"]
