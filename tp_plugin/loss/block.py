"""The rows of one block of logits: their statistics, then their gradient in the same memory, in plain PyTorch.

Letters: c rows (tokens), b columns (words of this rank), V words in all. Everything is in float32 (float64), on one
buffer of ``[c, b]`` that is overwritten twice: logits, exponentials, gradient.

The merge of (maximum, sum of exponentials) pairs is the online softmax of Milakov and Gimelshein
(https://arxiv.org/abs/1805.02867).
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch

from tp_plugin.loss.parts import Head, Transform
from tp_plugin.loss.products import product

NOTHING = float("-inf")
_OPTIONAL = ("logit_sum", "entropy", "square_sum", "mass", "top_id")


@dataclasses.dataclass(frozen=True)
class Targets:
    """The targets of c rows on b words.

    Attributes:
        labels: [c] global ids.
        valid: [c], False where a label does not count.
        start: global id of the first of the words.
        soft: [c, b] target probabilities times class weights, in the statistics' dtype; they replace the labels.
        classes: [b] class weights in that dtype, the weights of the sum of logits; None is 1.
    """

    labels: torch.Tensor
    valid: torch.Tensor
    start: int
    soft: torch.Tensor | None = None
    classes: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Asked:
    """Statistics that a row needs besides maximum, sum of exponentials and target logit.

    Attributes:
        logit_sum: the sum of all logits (times class weights), for label smoothing.
        entropy: the entropy of the softmax.
        gradient: ``gradient_`` will be called afterwards.
        square_sum: the sum of the squared exponentials.
        mass: there are soft targets; their sum.
        top_id: the id of the largest logit, of several equal ones the lowest.
    """

    logit_sum: bool = False
    entropy: bool = False
    gradient: bool = True
    square_sum: bool = False
    mass: bool = False
    top_id: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of a row's numbers, in order."""
        return ("top", "sum", "target", *(name for name in _OPTIONAL if getattr(self, name)))


@dataclasses.dataclass(frozen=True)
class RowStats:
    """Statistics of full rows, merged over the ranks; each [c] or None unless asked for.

    ``target`` is the logit of the label, or the sum of the logits times their soft targets.
    ``log_square_sum`` is that of the squared probabilities; ``top_id`` a global id, in the dtype of the rest.
    """

    log_z: torch.Tensor
    target: torch.Tensor
    logit_sum: torch.Tensor | None
    entropy: torch.Tensor | None
    log_square_sum: torch.Tensor | None
    mass: torch.Tensor | None
    top_id: torch.Tensor | None


@dataclasses.dataclass(frozen=True)
class Coefficients:
    """The gradient of a row as a linear combination, with softmax p, target y and entropy H:

    ``d_j = softmax * p_j - target * t_j - uniform * w_j + entropy * dH/dx_j``, each [c]; None is 0. ``t`` are the soft
    targets or 1 at y, ``w`` the class weights or 1.
    """

    softmax: torch.Tensor
    target: torch.Tensor
    uniform: torch.Tensor | None = None
    entropy: torch.Tensor | None = None

    def __getitem__(self, rows: slice) -> Coefficients:
        """The coefficients of some rows."""
        parts = (self.softmax, self.target, self.uniform, self.entropy)
        softmax, target, uniform, entropy = (None if part is None else part[rows] for part in parts)
        assert softmax is not None
        assert target is not None
        return Coefficients(softmax, target, uniform, entropy)


class Block(Protocol):
    """One block of logits; the two implementations are :class:`TorchBlock` and the Triton kernels."""

    def statistics(self) -> torch.Tensor:
        """This rank's ``[len(asked.names), c]`` to be gathered and merged by :func:`merge`."""

    def gradient_(self, log_z: torch.Tensor, entropy: torch.Tensor | None, by: Coefficients) -> torch.Tensor:
        """[c, b] gradient of the raw products up to ``transform.slope``, in the dtype of the hidden states.

        It overwrites the logits. ``statistics`` may have been called before or not.
        """


class TorchBlock:
    """The block of any device and floating dtype.

    Args:
        logits: [c, b] of this rank, float32 or float64, which this block overwrites.
        targets: of these rows and columns.
        dtype: of the gradient.
        transform: already applied to the logits; the gradient includes its derivative.
        asked: the statistics wanted.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        targets: Targets,
        dtype: torch.dtype,
        transform: Transform,
        asked: Asked,
    ) -> None:
        self.dtype, self.asked, self.soft, self.classes = dtype, asked, targets.soft, targets.classes
        local, columns = targets.labels - targets.start, logits.shape[1]
        self.start, self.mine = targets.start, targets.valid & (local >= 0) & (local < columns)
        self.target = local.clamp(0, max(0, columns - 1)).unsqueeze(1)
        self.bend = transform.bend_(logits.clone()) if transform.tanh and asked.gradient else None
        self.logits: torch.Tensor | None = logits
        self.exps, self.shift = logits, local  # set when the exponentials are made

    @classmethod
    def of_head(cls, head: Head, hidden: torch.Tensor, targets: Targets, asked: Asked, spare_bytes: int) -> TorchBlock:
        """The logits of ``hidden`` [c, H] against the rows of ``head.weight``; ``spare_bytes`` as for ``product``."""
        logits = product(hidden, head.weight, head.kept, spare_bytes).to(head.wide)
        if head.bias is not None:
            logits.add_(head.bias)
        return cls(head.transform.apply_(logits), targets, hidden.dtype, head.transform, asked)

    @staticmethod
    def bytes_per_logit(head: Head, asked: Asked) -> int:
        """Bytes of buffer, half-precision copy, derivatives of soft cap and entropy, and soft targets twice."""
        wide, narrow = head.wide.itemsize, head.hidden.dtype.itemsize
        return wide * (1 + head.transform.tanh + asked.entropy + 2 * asked.mass) + (narrow if narrow < wide else 0)

    def _exponentials(self, shift: torch.Tensor) -> torch.Tensor:
        assert self.logits is not None
        self.shift, self.exps = shift, self.logits.sub_(shift.unsqueeze(1)).exp_()
        self.logits = None
        return self.exps

    def statistics(self) -> torch.Tensor:
        logits = self.logits
        assert logits is not None
        best: list[torch.Tensor] = []
        if logits.shape[1]:
            if self.asked.top_id:
                top, first = logits.max(1)
                best = [first.add_(self.start).to(logits.dtype)]
            else:
                top = logits.amax(1)
            if self.soft is not None:
                hit = torch.linalg.vecdot(logits, self.soft)
            else:
                hit = torch.where(self.mine, logits.gather(1, self.target).squeeze(1), 0.0)
        else:
            top = logits.new_full((logits.shape[0],), NOTHING)
            hit = torch.zeros_like(top)
            best = [hit] if self.asked.top_id else []
        logit_sum = []
        if self.asked.logit_sum:
            logit_sum = [logits.sum(1) if self.classes is None else torch.mv(logits, self.classes)]
        # a shard of masked words only has the maximum -inf, and -inf - -inf is nan
        exps = self._exponentials(torch.where(top == NOTHING, 0.0, top))
        spread = [-torch.special.entr(exps).sum(1)] if self.asked.entropy else []
        squares = [torch.linalg.vector_norm(exps, dim=1).square_()] if self.asked.square_sum else []
        mass = [] if self.soft is None else [self.soft.sum(1)]
        return torch.stack([top, exps.sum(1), hit, *logit_sum, *spread, *squares, *mass, *best])

    def gradient_(self, log_z: torch.Tensor, entropy: torch.Tensor | None, by: Coefficients) -> torch.Tensor:
        d = self._exponentials(log_z) if self.logits is not None else self.exps
        factor, share = by.softmax, (self.shift - log_z).clamp(max=0.0).exp()  # the clamp is for masked shards' shift
        if by.entropy is None:
            d.mul_((share * factor).unsqueeze(1))
        else:  # dH/dx = -p (log p + H)
            assert entropy is not None
            d.mul_(share.unsqueeze(1))
            bent = torch.special.entr(d).mul_(by.entropy.unsqueeze(1))
            d.mul_((factor - by.entropy * entropy).unsqueeze(1)).add_(bent)
        if by.uniform is not None:
            uniform = by.uniform.unsqueeze(1)
            d.sub_(uniform) if self.classes is None else d.addcmul_(uniform, self.classes, value=-1)
        if self.soft is not None:
            d.addcmul_(self.soft, by.target.unsqueeze(1), value=-1)
        elif d.shape[1]:
            hit = torch.where(self.mine, by.target, 0.0).unsqueeze(1)
            d.scatter_(1, self.target, d.gather(1, self.target) - hit)
        if self.bend is not None:
            d.mul_(self.bend)
        return d.to(self.dtype)


def merge(parts: torch.Tensor, asked: Asked) -> RowStats:
    """Statistics of full rows from every rank's ``[ranks, len(asked.names), c]``."""
    given = dict(zip(asked.names, parts.unbind(1), strict=True))
    tops, sums, target = given["top"], given["sum"], given["target"].sum(0)
    top = tops.amax(0)
    factors = torch.where(tops == NOTHING, 0.0, (tops - top).exp())
    total = (sums * factors).sum(0)
    entropy = logit_sum = log_square_sum = top_id = None
    mass = given["mass"].sum(0) if asked.mass else None
    if asked.entropy:  # the sum of e (x - top) over all ranks, from sums relative to each rank's maximum
        apart = torch.where(tops == NOTHING, 0.0, tops - top)
        entropy = total.log() - (factors * (given["entropy"] + apart * sums)).sum(0) / total
    if asked.logit_sum:
        logit_sum = given["logit_sum"].sum(0)
    if asked.square_sum:
        log_square_sum = (factors.square() * given["square_sum"]).sum(0).log() - 2 * total.log()
    if asked.top_id:  # of the first rank with the maximum
        top_id = given["top_id"].gather(0, tops.argmax(0, keepdim=True)).squeeze(0)
    return RowStats(top + total.log(), target, logit_sum, entropy, log_square_sum, mass, top_id)
