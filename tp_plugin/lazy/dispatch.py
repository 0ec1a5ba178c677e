"""The table of operations that lazy logits answer without being computed, and the rule for all other operations.

Its rows are in ``deferred_ops.py`` and ``row_ops.py`` (results stay lazy) and in ``reduced_ops.py`` (results come from
the shards). A row is a function ``(func, logits, args, kwargs)`` registered with :func:`answers`. It returns
NotImplemented for a form it does not know; then the logits are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from tp_plugin.errors import TensorParallelError
from tp_plugin.lazy.logits import VocabParallelLogits, dense
from tp_plugin.lazy.recipe import version_of

_TABLE: dict[Any, Callable] = {}

# properties and methods that need no values
_PROPERTIES = frozenset(
    ["shape", "dtype", "device", "requires_grad", "grad_fn", "ndim", "is_leaf", "layout", "itemsize", "nbytes"]
    + ["names", "name", "output_nr", "_version", "_backward_hooks", "_post_accumulate_grad_hooks", "retains_grad"]
    + [name for name in dir(Tensor) if name.startswith("is_") and not callable(getattr(Tensor, name))]
)
_METHODS = {
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.is_contiguous),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_signed, Tensor.element_size, Tensor.storage_offset),
    *(Tensor.get_device, Tensor.is_inference, Tensor.dim_order, Tensor.is_same_size, Tensor._is_view),
    *(Tensor.is_conj, Tensor.is_neg, Tensor.__len__, Tensor.__hash__, Tensor.__format__),
    *(torch.is_floating_point, torch.is_complex, torch.numel, torch.is_signed, torch.is_inference),
}

_NO_VALUES = "logits that have not been computed have no {}; call logits.materialize() first and use its result."
_NO_GRAD = (
    "logits that were never computed have a factored gradient and no numbers for {}. Call logits.materialize() before "
    "the loss and use its result in both places."
)
_REFUSED = {
    Tensor.retain_grad: _NO_GRAD.format("retain_grad"),
    Tensor.register_post_accumulate_grad_hook: _NO_GRAD.format("a hook"),
    Tensor.data_ptr: _NO_VALUES.format("memory address"),
    Tensor.untyped_storage: _NO_VALUES.format("storage"),
    Tensor.storage: _NO_VALUES.format("storage"),
    Tensor.set_: _NO_VALUES.format("storage to be set"),
    Tensor.resize_: _NO_VALUES.format("storage to be resized"),
    Tensor.share_memory_: _NO_VALUES.format("memory to be shared"),
    Tensor.__reduce_ex__: "logits that have not been computed cannot be pickled; call logits.materialize() first, on "
    "every rank of the tensor-parallel group.",
    Tensor.__deepcopy__: "logits that have not been computed cannot be deep-copied; call logits.materialize() first.",
}


def answers(*funcs: Any) -> Callable[[Callable], Callable]:
    """Register a row of the table for ``funcs``."""

    def add(row: Callable) -> Callable:
        _TABLE.update(dict.fromkeys(funcs, row))
        return row

    return add


def answer(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute ``func`` of lazy logits: from the table, or from the computed logits (then a collective call)."""
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    kind = getattr(func, "__name__", "") if isinstance(getattr(func, "__self__", None), _DESCRIPTORS) else ""
    this = args[0] if args else None
    if isinstance(this, VocabParallelLogits) and this._full is not None:
        follow(this)
    if kind == "__get__" and owner == "grad":
        return None  # never a leaf
    # DeepSpeed puts a hook on each output of a model to learn that backward began. FactoredGrad refuses a hook that
    # reads the gradient's numbers.
    if func in _METHODS or (kind == "__get__" and owner in _PROPERTIES) or func is Tensor.register_hook:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if func in _REFUSED:
        raise TensorParallelError(_REFUSED[func])
    if kind in ("__set__", "__delete__") or (func is Tensor.requires_grad_ and not args[0].requires_grad):
        owner = owner or "requires_grad"
        raise TensorParallelError(f"cannot set .{owner} of lazy logits; call logits.materialize() first.")
    if kind == "__get__" and owner == "data":
        func, args, kwargs = Tensor.detach, args[:1], {}
    row = _TABLE.get(func)
    if row is not None and isinstance(this, VocabParallelLogits) and this._full is None:
        this.check_shared()
        found = row(func, this, args[1:], kwargs)
        if found is not NotImplemented:
            return found
    if func in (torch.autograd.grad, torch.autograd.backward):
        inputs = args[1] if func is torch.autograd.grad and len(args) > 1 else kwargs.get("inputs")
        if any(isinstance(leaf, VocabParallelLogits) for leaf in tree_leaves(inputs)):
            raise TensorParallelError(_NO_GRAD.format(f"autograd.{func.__name__}"))
    return _densely(func, args, kwargs)


_DESCRIPTORS = (type(Tensor.shape), property)


def _densely(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute ``func`` of the computed logits. The lazy tensors remember in-place changes and views of them."""
    made: dict[int, tuple[VocabParallelLogits, Tensor, int]] = {}

    def compute(x: Any) -> Any:
        if not isinstance(x, VocabParallelLogits):
            return x
        if id(x) not in made:
            full = dense(x)
            made[id(x)] = x, full, version_of(full)
        return made[id(x)][1]

    args, kwargs = tree_map(compute, args), tree_map(compute, kwargs)
    result = func(*args, **kwargs)
    for logits, full, version in made.values():
        if full.is_inference():  # without versions, the function's name decides
            changed = getattr(func, "__name__", "") == "__setitem__" or "out" in kwargs
        else:
            changed = version_of(full) != version
        if changed or any(_shares(leaf, full) for leaf in tree_leaves(result)):
            adopt(logits, full, version)
            result = tree_map(lambda leaf, full=full, logits=logits: logits if leaf is full else leaf, result)
    return result


def _shares(x: Any, full: Tensor) -> bool:
    return type(x) is Tensor and (x is full or x._base is full or (full._base is not None and x._base is full._base))


def adopt(logits: VocabParallelLogits, full: Tensor, version: int) -> None:
    """Turn ``logits`` into ``full``, which was changed in place or of which a view was returned.

    Args:
        logits: the lazy logits that ``full`` was computed from, or that already are ``full``.
        full: tracked by autograd.
        version: in-place version of ``full`` when it was computed.
    """
    if logits._full is not full:
        logits._full, logits._tracked, logits._followed = full, True, version
        logits._family.computed.append((full, version))
        _become(logits)
    follow(logits)


def follow(logits: VocabParallelLogits) -> None:
    """Update the autograd history of computed logits with changes made to ``_full``, perhaps through a view."""
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


def autocast_widens(logits: VocabParallelLogits) -> bool:
    """True if autocast makes ``logsumexp`` and ``log_softmax`` of these float32, which it does on accelerators only."""
    kind = logits.device.type
    return kind != "cpu" and torch.is_autocast_enabled(kind) and logits.dtype.itemsize < 4


VocabParallelLogits.handler = staticmethod(answer)
