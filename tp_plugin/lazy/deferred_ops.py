"""Elementwise operations that stay lazy: casts, scaling, a constant row, tanh, log-softmax."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tp_plugin.lazy.dispatch import answers, autocast_widens
from tp_plugin.lazy.head import added
from tp_plugin.lazy.logits import VocabParallelLogits, step
from tp_plugin.lazy.recipe import Family


def _relabelled(logits: VocabParallelLogits, dtype: torch.dtype) -> Any:
    if not dtype.is_floating_point:
        return NotImplemented
    if dtype == logits.dtype:
        return logits
    if logits._recipe.normalised and dtype.itemsize < logits.dtype.itemsize:
        return NotImplemented  # rounded after the normalisation, not before
    return step(logits, logits._recipe, logits.shape, dtype, Family())


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
    if "copy" in kwargs or len(args) > 2:  # a third one may mean copy
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
    return step(logits, logits._recipe, logits.shape, logits.dtype, Family())


@answers(Tensor.detach, torch.detach)
def _detach(func, logits, args, kwargs):
    return VocabParallelLogits(logits.shape, logits.dtype, logits._recipe, logits._family)


@answers(torch.log_softmax, Tensor.log_softmax, F.log_softmax)
def _log_softmax(func, logits, args, kwargs):
    """Log-probabilities are lazy too: nearly all losses gather those of the labels only."""
    given = dict(
        zip(("dim", "_stacklevel", "dtype") if func is F.log_softmax else ("dim", "dtype"), args, strict=False)
    )
    given |= kwargs
    if logits._recipe.normalised or given.pop("dim", None) not in (-1, logits.dim() - 1):
        return NotImplemented
    asked = given.pop("dtype", None)
    dtype = asked or logits.dtype
    given.pop("_stacklevel", None)
    if given or not dtype.is_floating_point:
        return NotImplemented
    if asked is None and autocast_widens(logits):
        dtype = torch.float32
    recipe = dataclasses.replace(logits._recipe, normalised=True)
    return step(logits, recipe, logits.shape, dtype, Family())


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
    if not isinstance(factor, Tensor) and factor == 0:
        return NotImplemented  # a product with 0 has no gradient to keep factored
    return _transformed(logits, logits._recipe.transform.times(1.0 / factor if divides else factor * 1.0))


@answers(Tensor.neg, Tensor.__neg__, torch.neg, torch.negative, Tensor.negative)
def _negate(func, logits, args, kwargs):
    return NotImplemented if args or kwargs else _transformed(logits, logits._recipe.transform.times(-1.0))


@answers(Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add)
def _add_row(func, logits, args, kwargs):
    """Add a constant for each word, as BART does: it joins the head's bias, with no gradient of its own.

    Or add other lazy logits, as a LoRA of the head does.
    """
    if len(args) == 1 and not kwargs and isinstance(args[0], VocabParallelLogits) and args[0]._full is None:
        found = added(logits, args[0])
        return NotImplemented if found is None else found
    row, recipe = args[0] if len(args) == 1 else None, logits._recipe
    if kwargs or type(row) is not Tensor or row.requires_grad or not recipe.transform.identity or recipe.normalised:
        return NotImplemented
    one_row = row.numel() == row.shape[-1] == logits.shape[-1] if row.dim() else False
    same = (
        row.dtype == logits.dtype == recipe.hidden.dtype and row.device == logits.device
    )  # a wider row would be rounded
    if not one_row or row.dim() > logits.dim() or not same:
        return NotImplemented
    own = row.reshape(-1)[recipe.vocab.start : recipe.vocab.stop]
    recipe = dataclasses.replace(recipe, bias=own.clone() if recipe.bias is None else recipe.bias + own)
    return step(logits, recipe, logits.shape, logits.dtype, Family())


@answers(torch.tanh, Tensor.tanh, F.tanh)
def _tanh(func, logits, args, kwargs):
    transform = logits._recipe.transform
    if args or kwargs or transform.tanh:
        return NotImplemented
    return _transformed(logits, dataclasses.replace(transform, tanh=True))


def _transformed(logits, transform):
    if logits._recipe.normalised:
        return NotImplemented
    recipe = dataclasses.replace(logits._recipe, transform=transform)
    return step(logits, recipe, logits.shape, logits.dtype, Family())


@answers(Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.new_tensor)
def _new(func, logits, args, kwargs):
    return func(torch.empty(0, dtype=logits.dtype, device=logits.device), *args, **kwargs)
