"""Rows of the table that are answered from the shards: the loss, and the few numbers people take out of logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tp_plugin.lazy import nodes, values
from tp_plugin.lazy.table import answers
from tp_plugin.loss.parts import Options

FEW = 64  # words a row that are selected one by one; for more the logits are computed


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
    if logits._recipe.normalised:  # a softmax leaves log-probabilities as they are
        logits = nodes.unnormalised(logits)
    return nodes.cross_entropy(logits, target, Options(**given))


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
    dtype = torch.float32 if nodes.autocast_widens(logits) else logits.dtype
    return _kept(values.log_z(logits).unsqueeze(-1), given.get("keepdim", False)).to(dtype)


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
        torch._assert_async(inside.all(), "an index of gather lies outside the vocabulary")
    elif not inside.all():
        return NotImplemented  # for torch's own error
    if not logits._recipe.normalised:
        return values.selected(logits, index).to(logits.dtype)
    raw = nodes.unnormalised(logits)
    return (values.selected(raw, index) - values.log_z(raw).unsqueeze(-1)).to(logits.dtype)


@answers(torch.argmax, Tensor.argmax)
def _argmax(func, logits, args, kwargs):
    given = _dim(logits, args, kwargs, "dim", "keepdim")
    if given is None or set(given) - {"keepdim"}:
        return NotImplemented
    return _kept(values.top_ids(logits, 1), given.get("keepdim", False))


@answers(torch.max, Tensor.max)
def _max(func, logits, args, kwargs):
    given = _dim(logits, args, kwargs, "dim", "keepdim")
    if given is None or set(given) - {"keepdim"}:
        return NotImplemented
    ids = values.top_ids(logits, 1)
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
    ids = values.top_ids(logits, k)
    return torch.return_types.topk((_gather(Tensor.gather, logits, (-1, ids), {}), ids))
