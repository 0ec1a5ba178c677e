"""Losses of the fuzzer: each the same function of a whole model and of a sharded one."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from tests.fuzz.case import Case
from tests.fuzz.families import CAUSAL, FAMILIES, SEQ2SEQ

Micro = dict[str, torch.Tensor]
Shard = dict[str, Any] | None  # keyword arguments of linear_cross_entropy


def loss_of(case: Case, model: Any, head: Any, data: Micro, items: int, shard: Shard = None) -> torch.Tensor:
    """The loss of one micro-batch.

    Args:
        model: a module, or the engine around it.
        head: the output embeddings, for ``direct``; they may hold a shard.
        items: labels of the step that count, on all ranks together.
        shard: how ``head`` lies on the ranks; None in one process, where torch's own functions say what is right.
    """
    kind = FAMILIES[case.family].kind
    if case.loss == "items":
        return model(**data, num_items_in_batch=torch.tensor(items)).loss
    if case.loss == "mean":
        return model(**data).loss
    if case.loss == "fused":
        return model(**data, fused_lm_head=True, use_cache=False).loss
    if case.loss == "direct":
        return _direct(case, model, head, data, items, shard)
    if kind == SEQ2SEQ:
        logits, labels = model(**data).logits, data["labels"]
    else:
        logits, labels = model(**{name: x for name, x in data.items() if name != "labels"}).logits, data["labels"]
        logits = logits[:, -labels.shape[1] :]  # behind virtual tokens
    if kind == CAUSAL:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return OVER_LOGITS[case.loss](logits, labels)


def smoothing(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    flat = logits.reshape(-1, logits.shape[-1])
    return F.cross_entropy(flat, labels.reshape(-1), label_smoothing=0.1, reduction="sum") / 7


def own(logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """How far the log-probability of each label is from -1, squared."""
    chosen = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    counted = labels != -100
    divisor = counted.sum() if num_items_in_batch is None else num_items_in_batch
    return ((chosen + 1) ** 2 * counted).sum() / divisor.clamp(min=1)


def normaliser(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy and the square of the logarithm of the normaliser."""
    flat = logits.reshape(-1, logits.shape[-1])
    return F.cross_entropy(flat, labels.reshape(-1), reduction="sum") / 5 + 1e-2 * logits.logsumexp(-1).square().mean()


def entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy less a bonus for entropy, which needs the logits' values."""
    flat = logits.reshape(-1, logits.shape[-1]).float()
    spread = -(flat.softmax(-1) * flat.log_softmax(-1)).sum(-1).mean()
    return F.cross_entropy(flat, labels.reshape(-1), reduction="sum") / 5 - 0.1 * spread


OVER_LOGITS = {"smoothing": smoothing, "own": own, "normaliser": normaliser, "entropy": entropy}


def _direct(case: Case, model: Any, head: Any, data: Micro, items: int, shard: Shard) -> torch.Tensor:
    """``linear_cross_entropy`` of the hidden states and the head's weight; in one process torch's cross entropy."""
    inputs = {name: x for name, x in data.items() if name != "labels"}
    hidden = model(**inputs, output_hidden_states=True).hidden_states[-1][:, :-1]
    labels, how = data["labels"][:, 1:], dict(case.direct)
    weights = torch.linspace(0.2, 1.5, labels.numel()).view(labels.shape) if how.pop("weights") else None
    bias = getattr(head, "bias", None)
    reduction = how["reduction"]
    if shard is not None:
        from tp_plugin.loss import linear_cross_entropy

        how |= {"reduction": "sum", "num_items": items} if reduction == "items" else {}
        loss = linear_cross_entropy(hidden, head.weight, labels, bias=bias, token_weights=weights, **shard, **how)
        return loss.sum() / 3 if reduction == "none" else loss
    logits = how["scale"] * F.linear(hidden, head.weight, bias)
    if how["softcap"] is not None:
        logits = how["softcap"] * torch.tanh(logits / how["softcap"])
    flat, goal = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    each = F.cross_entropy(flat, goal, label_smoothing=how["label_smoothing"], reduction="none")
    counted = goal != -100
    each = each + how["z_loss"] * flat.logsumexp(-1).square() * counted
    total = (each if weights is None else each * weights.reshape(-1)).sum()
    divisor = {"mean": int(counted.sum()), "items": items, "none": 3, "sum": 1}[reduction]
    return total / divisor if divisor else total * 0 + math.nan  # as torch's: the loss is NaN, its gradients are 0
