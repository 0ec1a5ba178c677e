"""The peers of ``benchmarks/loss.py``: each a function (hidden, weight, labels, group) -> mean loss, or why it can't.

``hidden`` [N, H], ``weight`` [v, H] this rank's rows, ``labels`` [N] global ids, ``group`` None for one rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tp_plugin.collectives import copy_to_region
from tp_plugin.loss import VocabShard, linear_cross_entropy

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Peer:
    """``loss`` is called, and differentiated, inside ``around()``."""

    loss: Loss
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def peers(device: torch.device, tp: int, vocab: int, real: bool) -> tuple[dict[str, Peer], dict[str, str]]:
    """Those that can run here, and of the others why not.

    Args:
        device: where.
        tp: ranks of the group.
        vocab: words in all.
        real: whether the group's ranks exist; a fake group has the shapes and times of one rank, and no right values.
    """
    found: dict[str, Peer] = {}
    missing: dict[str, str] = {}
    for name, make in _MAKERS.items():
        try:
            made = make(device, tp, vocab, real)
        except ImportError as failure:
            made = f"not installed ({failure.name})"
        if isinstance(made, str):
            missing[name] = made
        else:
            found[name] = made if isinstance(made, Peer) else Peer(made)
    return found, missing


def _ours(device, tp, vocab, real, **options):
    def loss(hidden, weight, labels, group):
        return linear_cross_entropy(hidden, weight, labels, vocab=VocabShard.balanced(vocab, group), **options)

    return loss


def _ours_recompute(device, tp, vocab, real):
    return _ours(device, tp, vocab, real, recompute=True)


def _ours_torch(device, tp, vocab, real):
    return _ours(device, tp, vocab, real, impl="chunked") if device.type == "cuda" else "the same as ours on CPU"


def _plain(device, tp, vocab, real):
    if tp > 1:
        return "one rank only"
    return lambda hidden, weight, labels, group: F.cross_entropy((hidden @ weight.t()).float(), labels)


def _torch_linear(device, tp, vocab, real):
    if tp > 1:
        return "one rank only"
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, labels, group: F.linear_cross_entropy(hidden, weight, labels, options=options)


def _loss_parallel(device, tp, vocab, real):
    if tp == 1:
        return "a group only"
    if vocab % tp:
        return "uneven vocabulary"
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.parallel import loss_parallel

    mesh: list[DeviceMesh] = []

    def loss(hidden, weight, labels, group):
        mesh[:] = mesh or [DeviceMesh.from_group(group, device.type)]
        logits = (copy_to_region(hidden, group) @ weight.t()).float()
        return F.cross_entropy(DTensor.from_local(logits, mesh[0], [Shard(1)]), labels)

    return Peer(loss, loss_parallel)


def _deepspeed(backend):
    def make(device, tp, vocab, real):
        from deepspeed.sequence.cross_entropy import vocab_parallel_cross_entropy

        if backend == "liger":
            if device.type != "cuda":
                return "a GPU only"
            importlib.import_module("liger_kernel")

        def loss(hidden, weight, labels, group):
            logits = copy_to_region(hidden, group) @ weight.t()
            start, stop = _bounds(vocab, group)
            return vocab_parallel_cross_entropy(
                logits, labels, tp_group=group, vocab_start_index=start, vocab_end_index=stop, global_vocab_size=vocab,
                backend=backend,
            )  # fmt: skip

        return loss

    return make


def _deepspeed_fused(device, tp, vocab, real):
    from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy

    if tp > 1 and not real:
        return "validates its shards with collectives each call, which a fake group fails"

    def loss(hidden, weight, labels, group):
        start, stop = _bounds(vocab, group)
        return vocab_parallel_linear_cross_entropy(
            hidden, weight, labels, tp_group=group, vocab_start_index=start, vocab_end_index=stop
        )

    return loss


def _liger_fused(device, tp, vocab, real):
    if tp > 1:
        return "one rank only"
    if device.type != "cuda":
        return "a GPU only"
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda hidden, weight, labels, group: liger_fused_linear_cross_entropy(hidden, weight, labels)


def _liger_vocab_parallel(device, tp, vocab, real):
    if device.type != "cuda":
        return "a GPU only"
    from liger_kernel.ops.vocab_parallel_cross_entropy import LigerVocabParallelCEFunction

    def loss(hidden, weight, labels, group):
        logits = copy_to_region(hidden, group) @ weight.t()
        losses = LigerVocabParallelCEFunction.apply(logits, labels, group, -100, 0.0, "pytorch", "global")
        return losses.sum() / (labels != -100).sum()

    return loss


def _cce(device, tp, vocab, real):
    if tp > 1:
        return "one rank only"
    if device.type != "cuda":
        return "a GPU only"
    from cut_cross_entropy import linear_cross_entropy as cce

    return lambda hidden, weight, labels, group: cce(hidden, weight, labels, filter_eps=None)


def _quack(device, tp, vocab, real):
    if tp > 1:
        return "one rank only"
    if device.type != "cuda":
        return "a GPU only"
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda hidden, weight, labels, group: chunked_linear_cross_entropy(hidden, weight, labels, reduction="mean")


def _bounds(vocab: int, group: dist.ProcessGroup | None) -> tuple[int, int]:
    shard = VocabShard.balanced(vocab, group)
    return shard.start, shard.stop


_MAKERS: dict[str, Callable[..., Peer | Loss | str]] = {
    "ours": _ours,
    "ours, recompute": _ours_recompute,
    "ours, no triton": _ours_torch,
    "plain": _plain,
    "torch linear_cross_entropy": _torch_linear,
    "torch loss_parallel": _loss_parallel,
    "deepspeed torch": _deepspeed("torch"),
    "deepspeed liger": _deepspeed("liger"),
    "deepspeed fused": _deepspeed_fused,
    "liger fused": _liger_fused,
    "liger vocab-parallel": _liger_vocab_parallel,
    "cut-cross-entropy": _cce,
    "quack": _quack,
}
