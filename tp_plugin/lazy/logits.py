"""VocabParallelLogits: the logits of a sharded head that have not been computed yet, and how they are computed."""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from tp_plugin.collectives import all_gather, all_reduce_
from tp_plugin.errors import TensorParallelError
from tp_plugin.lazy.grad import SAME, SHAPED, FactoredGrad, expect_factored
from tp_plugin.lazy.recipe import STEPS, Family, Recipe, version_of
from tp_plugin.loss.node import refuse_double_backward
from tp_plugin.loss.parts import HeadGrads, wide_of

PURPOSE = "logits"  # under which the collectives of computing all logits are counted
Pull = Callable[[torch.Tensor], torch.Tensor]  # from a hidden gradient to that of the tensor before the operation


class VocabParallelLogits(torch.Tensor):
    """Logits [..., V] of a vocabulary-parallel head, computed when something needs their values, or never.

    Operations of HuggingFace models between head and loss are recorded: row slices, ``.float()``, ``.view(-1, V)``,
    scaling by a number, a tanh soft cap. ``F.cross_entropy`` becomes the fused vocabulary-parallel loss. Any other
    operation first computes the full logits of the whole group, differentiable, and continues with those. Such a
    computation is a collective call: all ranks of the group must make it.

    An in-place operation computes the logits, changes them, and turns this tensor into the changed ones.

    Raises, where used:
        TensorParallelError: an optimizer stepped since the forward pass; a tensor that would share memory with this
            one was changed in place; an operation has no meaning on values that do not exist (``retain_grad``, hooks,
            ``autograd.grad`` with respect to them, ``data_ptr``, pickling).
    """

    handler: ClassVar[Callable[[Any, Any, Any], Any]]
    """Computes ``func(*args, **kwargs)`` of lazy logits. ``dispatch.py``, which is built on this class, sets it."""

    _recipe: Recipe
    _family: Family
    _full: torch.Tensor | None  # The values, once this tensor was changed in place or returned a view of them.
    _followed: int  # The version of _full that this tensor's autograd history includes.
    _tracked: bool  # Autograd follows _full; if False, gradients go through this tensor's own grad_fn.

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        recipe: Recipe,
        family: Family | None = None,
        full: torch.Tensor | None = None,
    ) -> VocabParallelLogits:
        logits = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=recipe.hidden.device)
        logits._recipe = recipe
        logits._family = Family() if family is None else family
        logits._full, logits._tracked, logits._followed = full, False, -1
        return logits

    @classmethod
    @torch.compiler.disable
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls.handler(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Keep outputs of other libraries' autograd Functions lazy through the aliases that C++ makes of them."""
        this = args[0]
        same = func in SAME or (func in SHAPED and isinstance(this, cls) and tuple(args[1]) == tuple(this.shape))
        if isinstance(this, cls) and same:
            full = None if this._full is None else this._full.detach()
            return cls(this.shape, this.dtype, this._recipe, this._family, full)
        raise TensorParallelError(
            f"{func} needs the memory of logits that have not been computed. Call logits.materialize() before."
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        state = "not computed" if self._full is None else "computed"
        return f"VocabParallelLogits(shape={tuple(self.shape)}, dtype={self.dtype}, {state})"

    def materialize(self) -> torch.Tensor:
        """The full logits, an ordinary differentiable tensor of this shape and dtype; a copy, and a collective call.

        Raises:
            TensorParallelError: an optimizer stepped since the forward pass, or logits that share memory were changed.
        """
        full = dense(self)
        return full if self._full is None else full.clone()

    def check_fresh(self) -> None:
        """Raise unless the values could still be computed as of the forward pass."""
        if self._full is None and self._recipe.step != STEPS.value:
            raise TensorParallelError(
                "these logits have not been computed yet, and an optimizer has stepped since the forward pass that "
                "made them: computed now they would come from the new weights. Call logits.materialize() before "
                "optimizer.step(), on every rank of the tensor-parallel group."
            )

        if self._full is None and version_of(self._recipe.source[0]) != self._recipe.source[1]:
            raise TensorParallelError(
                "these logits have not been computed yet, and the hidden states they come from were changed in place "
                "since the head was called: call logits.materialize() before, or change a copy."
            )

    def check_shared(self) -> None:
        """Raise if an in-place change to logits that share memory with these would be lost."""
        if self._family.changed(self._full):
            raise TensorParallelError(
                "logits that share memory with these (a view, a slice, a detached copy) were changed in place, and "
                "these would lose the change. Call logits.materialize() before taking views, or clone() before an "
                "in-place change."
            )


def step(
    logits: VocabParallelLogits,
    recipe: Recipe,
    shape: Sequence[int],
    dtype: torch.dtype,
    family: Family,
    pull: Pull | None = None,
) -> VocabParallelLogits:
    """Lazy logits made from lazy logits; ``pull`` maps hidden gradients back, None leaves them as they are."""
    return _Step.apply(logits, recipe, tuple(shape), dtype, family, pull)


def unnormalised(logits: VocabParallelLogits) -> VocabParallelLogits:
    """Lazy logits of which ``logits`` are the log-probabilities. A gradient by the one is a gradient by the other."""
    recipe = dataclasses.replace(logits._recipe, normalised=False)
    return step(logits, recipe, logits.shape, logits.dtype, Family())


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


def materialise_outputs(output: Any) -> Any:
    """``output`` with every lazy logits in it computed, for a model's forward hook under ``no_grad``.

    Without it, ``if rank == 0: output.logits.argmax(-1)`` would start a collective that the other ranks never join.
    A collective call if there are lazy logits.

    Args:
        output: a tensor, tuple, named tuple, list, mapping, dataclass or HuggingFace ``ModelOutput``, nested at will.

    Returns:
        ``output`` itself if it has no lazy logits; else a copy of the same type, keys and attributes alike.
    """
    if isinstance(output, VocabParallelLogits):
        return output.materialize()
    if isinstance(output, tuple | list):
        items = [materialise_outputs(item) for item in output]
        if all(new is old for new, old in zip(items, output, strict=True)):
            return output
        return output._make(items) if hasattr(output, "_make") else type(output)(items)
    mapping = isinstance(output, MutableMapping)  # ModelOutput too: setting its key sets its attribute
    if mapping:
        parts = dict(output.items())
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        parts = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    else:
        return output
    changed = {name: new for name, old in parts.items() if (new := materialise_outputs(old)) is not old}
    if not changed:
        return output
    made = copy.copy(typing.cast(Any, output))
    for name, value in changed.items():
        if mapping:
            made[name] = value
        else:
            object.__setattr__(made, name, value)  # frozen ones too
    return made


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


class _Materialise(torch.autograd.Function):
    """The full logits. In backward the gradient of the full logits, equal on all ranks, becomes a factored one."""

    @staticmethod
    def forward(ctx, logits):
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.dtype, ctx.device = logits.shape, logits.dtype, logits.device
        ctx.recipe = logits._recipe
        recipe = logits._recipe
        ctx.save_for_backward(recipe.hidden, recipe.weight, recipe.bias)
        own = recipe.own_logits(recipe.hidden, logits.dtype)  # no view: it may be changed in place
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


class _Unwrap(torch.autograd.Function):
    """A copy of values that autograd follows only through the lazy tensor that has them."""

    @staticmethod
    def forward(ctx, logits):
        ctx.set_materialize_grads(False)
        return logits._full.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad
