"""The table of operations lazy logits answer without being computed, and what happens to all others.

A row of the table is a function ``(func, logits, args, kwargs)`` registered with :func:`answers`; it returns
NotImplemented for a form it does not know, and the logits are computed then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from tp_plugin.errors import TensorParallelError
from tp_plugin.lazy import nodes, rows
from tp_plugin.lazy.logits import Family, VocabParallelLogits
from tp_plugin.loss.parts import Options

_TABLE: dict[Any, Callable] = {}

# properties and methods that say something about a tensor without its values
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
    "the gradient of logits that were never computed is kept factored and has no numbers to give to {}; call "
    "logits.materialize() before the loss and use its result in both places."
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
    """What ``func`` of lazy logits is: from the table, or from the computed logits (then a collective call)."""
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    kind = getattr(func, "__name__", "") if isinstance(getattr(func, "__self__", None), _DESCRIPTORS) else ""
    this = args[0] if args else None
    if isinstance(this, VocabParallelLogits) and this._full is not None:
        nodes.follow(this)
    if kind == "__get__" and owner == "grad":
        return None  # never a leaf
    # DeepSpeed hangs a hook on every output of a model to learn that backward began. A hook that looks at the
    # gradient's numbers is refused by FactoredGrad when it does.
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
    """``func`` of the computed logits. In-place changes and views of them are remembered by the lazy tensors."""
    made: dict[int, tuple[VocabParallelLogits, Tensor, int]] = {}

    def compute(x: Any) -> Any:
        if not isinstance(x, VocabParallelLogits):
            return x
        if id(x) not in made:
            full = nodes.dense(x)
            made[id(x)] = x, full, nodes.version_of(full)
        return made[id(x)][1]

    args, kwargs = tree_map(compute, args), tree_map(compute, kwargs)
    result = func(*args, **kwargs)
    for logits, full, version in made.values():
        if full.is_inference():  # no versions there: judge by the looks
            changed = getattr(func, "__name__", "") == "__setitem__" or "out" in kwargs
        else:
            changed = nodes.version_of(full) != version
        if changed or any(_shares(leaf, full) for leaf in tree_leaves(result)):
            nodes.adopt(logits, full, version)
            result = tree_map(lambda leaf, full=full, logits=logits: logits if leaf is full else leaf, result)
    return result


def _shares(x: Any, full: Tensor) -> bool:
    return type(x) is Tensor and (x is full or x._base is full or (full._base is not None and x._base is full._base))


# ---- the table ---------------------------------------------------------------------------------------------------


@answers(F.cross_entropy)
def _cross_entropy(func, logits, args, kwargs):
    names = ("target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
    given = dict(zip(names, args, strict=False)) | kwargs
    target = given.pop("target", None)
    plain = all(given.pop(name, None) is None for name in ("weight", "size_average", "reduce"))
    indices = type(target) is Tensor and target.dtype == torch.int64 and target.shape == logits.shape[:1]
    if not (plain and indices and logits.dim() == 2 and given.get("reduction", "mean") in ("mean", "sum", "none")):
        return NotImplemented  # class weights, probabilities, the (N, V, d1, ...) form, torch's own errors
    if not 0.0 <= given.get("label_smoothing", 0.0) <= 1.0:
        return NotImplemented
    return nodes.cross_entropy(logits, target, Options(**given))


def _relabelled(logits: VocabParallelLogits, dtype: torch.dtype) -> Any:
    if not dtype.is_floating_point:
        return NotImplemented
    if dtype == logits.dtype:
        return logits
    return nodes.step(logits, logits._recipe, logits.shape, dtype, Family())


_CASTS = {
    Tensor.float: torch.float32,
    Tensor.double: torch.float64,
    Tensor.half: torch.float16,
    Tensor.bfloat16: torch.bfloat16,
}


@answers(*_CASTS)
def _cast(func, logits, args, kwargs):
    return NotImplemented if args or kwargs else _relabelled(logits, _CASTS[func])


@answers(Tensor.type, Tensor.type_as)
def _type(func, logits, args, kwargs):
    if func is Tensor.type_as and len(args) == 1:
        return _relabelled(logits, args[0].dtype) if args[0].device == logits.device else NotImplemented
    if len(args) == 1 and isinstance(args[0], torch.dtype):
        return _relabelled(logits, args[0])
    return NotImplemented


@answers(Tensor.to)
def _to(func, logits, args, kwargs):
    if "copy" in kwargs or len(args) > 3:
        return NotImplemented
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    here = device is None or torch.empty(0, device=device).device == logits.device
    if not here or memory_format is not None:
        return NotImplemented
    return logits if dtype is None else _relabelled(logits, dtype)


@answers(Tensor.cuda, Tensor.cpu)
def _move(func, logits, args, kwargs):
    return logits if not args and not kwargs and logits.device.type == func.__name__ else NotImplemented


@answers(Tensor.contiguous)
def _contiguous(func, logits, args, kwargs):
    return NotImplemented if args or kwargs else logits


@answers(Tensor.clone, torch.clone)
def _clone(func, logits, args, kwargs):
    return nodes.step(logits, logits._recipe, logits.shape, logits.dtype, Family())


@answers(Tensor.detach, torch.detach)
def _detach(func, logits, args, kwargs):
    return VocabParallelLogits(logits.shape, logits.dtype, logits._recipe, logits._family)


@answers(
    Tensor.view,
    Tensor.reshape,
    torch.reshape,
    Tensor.flatten,
    torch.flatten,
    Tensor.unflatten,
    Tensor.squeeze,
    torch.squeeze,
    Tensor.unsqueeze,
    torch.unsqueeze,
    Tensor.view_as,
    Tensor.reshape_as,
)
def _reshape(func, logits, args, kwargs):
    shape = rows.reshaped(func, logits.shape, args, kwargs)
    if shape is None:
        return NotImplemented
    recipe = logits._recipe
    hidden = recipe.hidden.reshape(*shape[:-1], recipe.hidden.shape[-1])
    lead = recipe.hidden.shape
    recipe = dataclasses.replace(recipe, hidden=hidden)
    return nodes.step(logits, recipe, shape, logits.dtype, logits._family, lambda grad: grad.reshape(lead))


@answers(Tensor.__getitem__)
def _getitem(func, logits, args, kwargs):
    taken = rows.taken(logits._recipe.hidden, args[0])
    if taken is None:
        return NotImplemented
    hidden, pull, is_view = taken
    recipe = dataclasses.replace(logits._recipe, hidden=hidden)
    shape = (*hidden.shape[:-1], logits.shape[-1])
    if len(shape) < 2:  # a single row: nothing to gain
        return NotImplemented
    return nodes.step(logits, recipe, shape, logits.dtype, logits._family if is_view else Family(), pull)


@answers(
    Tensor.mul,
    Tensor.multiply,
    Tensor.__mul__,
    Tensor.__rmul__,
    torch.mul,
    torch.multiply,
    Tensor.div,
    Tensor.divide,
    Tensor.true_divide,
    Tensor.__truediv__,
    torch.div,
    torch.divide,
    torch.true_divide,
)
def _scale(func, logits, args, kwargs):
    if kwargs or len(args) != 1:
        return NotImplemented
    factor = args[0]
    if type(factor) is Tensor or isinstance(factor, torch.nn.Parameter):
        kinds = factor.is_floating_point() or factor.dtype in (torch.int64, torch.int32)
        if factor.dim() or not kinds or (factor.requires_grad and torch.is_grad_enabled()):
            return NotImplemented
        factor = factor.detach().double()
    elif type(factor) not in (int, float):
        return NotImplemented
    divides = "div" in func.__name__
    if divides and not isinstance(factor, Tensor) and factor == 0:
        return NotImplemented
    return _transformed(logits, logits._recipe.transform.times(1.0 / factor if divides else factor * 1.0))


@answers(Tensor.neg, Tensor.__neg__, torch.neg, torch.negative, Tensor.negative)
def _negate(func, logits, args, kwargs):
    return NotImplemented if args or kwargs else _transformed(logits, logits._recipe.transform.times(-1.0))


@answers(Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add)
def _add_row(func, logits, args, kwargs):
    """A constant for each word, as BART adds: part of the head's bias from then on, with no gradient of its own."""
    row, recipe = args[0] if len(args) == 1 else None, logits._recipe
    if kwargs or type(row) is not Tensor or row.requires_grad or not recipe.transform.identity:
        return NotImplemented
    one_row = row.numel() == row.shape[-1] == logits.shape[-1] if row.dim() else False
    if not one_row or row.dim() > logits.dim() or (row.dtype, row.device) != (logits.dtype, logits.device):
        return NotImplemented
    own = row.reshape(-1)[recipe.vocab.start : recipe.vocab.stop].to(recipe.hidden.dtype)
    recipe = dataclasses.replace(recipe, bias=own.clone() if recipe.bias is None else recipe.bias + own)
    return nodes.step(logits, recipe, logits.shape, logits.dtype, Family())


@answers(torch.tanh, Tensor.tanh, F.tanh)
def _tanh(func, logits, args, kwargs):
    transform = logits._recipe.transform
    if args or kwargs or transform.tanh:
        return NotImplemented
    return _transformed(logits, dataclasses.replace(transform, tanh=True))


def _transformed(logits, transform):
    recipe = dataclasses.replace(logits._recipe, transform=transform)
    return nodes.step(logits, recipe, logits.shape, logits.dtype, Family())


@answers(Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.new_tensor)
def _new(func, logits, args, kwargs):
    return func(torch.empty(0, dtype=logits.dtype, device=logits.device), *args, **kwargs)
