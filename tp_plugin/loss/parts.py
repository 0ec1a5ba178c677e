"""The arguments and gradients of the loss: Transform, Head, Options, Wanted, HeadGrads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from tp_plugin.errors import TensorParallelError
from tp_plugin.loss.vocab import VocabShard

Scalar = float | torch.Tensor  # a Python number, or a 0-dim tensor on the device that the host must not read
REDUCTIONS = ("mean", "sum", "none")


def wide_of(dtype: torch.dtype) -> torch.dtype:
    """Dtype of arithmetic on logits of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., v] as a matrix; v may be 0, which ``reshape(-1, v)`` refuses."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


@dataclasses.dataclass(frozen=True)
class Transform:
    """The map from a raw product to a logit: ``outer * tanh(inner * z)``, or ``inner * z``.

    Attributes:
        inner: multiplies ``hidden @ weight.T + bias``.
        outer: multiplies the tanh; 1 when there is none.
        tanh: True if there is a tanh (Gemma's soft cap ``c``: inner ``1/c``, outer ``c``).
    """

    inner: Scalar = 1.0
    outer: Scalar = 1.0
    tanh: bool = False

    @classmethod
    def of(cls, scale: float = 1.0, softcap: float | None = None) -> Transform:
        """``scale * z``, then ``softcap * tanh(./softcap)`` unless that is None or 0."""
        return cls(scale) if not softcap else cls(scale / softcap, softcap, True)

    def times(self, factor: Scalar) -> Transform:
        """This transform, then a multiplication by ``factor``."""
        if self.tanh:
            return dataclasses.replace(self, outer=self.outer * factor)
        return dataclasses.replace(self, inner=self.inner * factor)

    @property
    def identity(self) -> bool:
        """True if it is known to change nothing."""
        return not self.tanh and isinstance(self.inner, float) and self.inner == 1.0

    @property
    def slope(self) -> Scalar:
        """The part of the derivative that is the same for every logit."""
        return self.inner * self.outer

    def apply_(self, z: torch.Tensor) -> torch.Tensor:
        """Turn raw products into logits, in place."""
        if not self.identity:
            z.mul_(self.inner)
        return z.tanh_().mul_(self.outer) if self.tanh else z

    def bend_(self, logits: torch.Tensor) -> torch.Tensor:
        """Overwrite logits with the rest of the derivative, ``1 - tanh^2``. Only where ``tanh``."""
        return logits.div_(self.outer).square_().neg_().add_(1)


@dataclasses.dataclass(frozen=True)
class Head:
    """The factors of one matrix of logits; none of the tensors is tracked by autograd.

    Attributes:
        hidden: [N, H], equal on all ranks of the group.
        weight: [v, H], this rank's rows, in the dtype of ``hidden``.
        bias: [v] or None.
        vocab: which rows.
        transform: from products to logits.
        logits_dtype: of the products, which are accumulated and kept in it; None is that of ``hidden``.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    vocab: VocabShard
    transform: Transform = Transform()
    logits_dtype: torch.dtype | None = None

    @property
    def wide(self) -> torch.dtype:
        """Dtype of the arithmetic on logits and of the statistics: float64 for float64, else float32."""
        return wide_of(self.hidden.dtype)

    @property
    def kept(self) -> torch.dtype:
        """Dtype of the products."""
        return self.logits_dtype or self.hidden.dtype

    def columns(self, start: int, stop: int) -> Head:
        """The same for rows ``[start, stop)`` of this rank's weight; ``vocab`` stays that of the full shard."""
        bias = None if self.bias is None else self.bias[start:stop]
        return dataclasses.replace(self, weight=self.weight[start:stop], bias=bias)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the cross entropy, as in ``torch.nn.functional.cross_entropy``, and the weight of the z-loss.

    Raises:
        TensorParallelError: an unknown reduction, a label smoothing outside [0, 1], a z-loss that is not finite.
    """

    reduction: str = "mean"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if self.reduction not in REDUCTIONS:
            raise TensorParallelError(f"reduction must be one of {REDUCTIONS}, got {self.reduction!r}.")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise TensorParallelError(f"label_smoothing must lie in [0, 1], got {self.label_smoothing!r}.")
        if not math.isfinite(self.z_loss):
            raise TensorParallelError(f"z_loss must be a finite number, got {self.z_loss!r}.")


def logits_dtype_of(asked: torch.dtype | None, dtype: torch.dtype) -> torch.dtype | None:
    """``Head.logits_dtype`` for products of factors of ``dtype``; float32 asks for at least that.

    Raises:
        TensorParallelError: a dtype that is neither float32 nor that of the factors.
    """
    if asked not in (None, dtype, torch.float32):
        raise TensorParallelError(f"logits_dtype must be torch.float32, {dtype} (the inputs') or None, got {asked!r}.")
    return wide_of(dtype) if asked == torch.float32 else None


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The gradients asked for, the same on all ranks of the group."""

    hidden: bool
    weight: bool
    bias: bool

    def __bool__(self) -> bool:
        return self.hidden or self.weight or self.bias


@dataclasses.dataclass(frozen=True)
class HeadGrads:
    """Gradients of a head, to be multiplied by ``scale``; None where not wanted.

    They stay apart from their scale until they are unpacked, so that neither 1/n nor a loss scale rounds them in half
    precision.

    Attributes:
        hidden: [N, H] or the shape of the hidden states; already summed over the group.
        weight: [v, H], this rank's rows; in float32 when it was accumulated over chunks.
        bias: [v].
        scale: 0-dim, float32 or float64.
        fresh: made for one backward and unpacked once, so that the tensors may be scaled in place.
    """

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    scale: torch.Tensor
    fresh: bool = False

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The gradients and their scale."""
        return self.hidden, self.weight, self.bias, self.scale

    def scaled(self, factor: Scalar) -> HeadGrads:
        """The same gradients times ``factor``."""
        if isinstance(factor, torch.Tensor):
            factor = factor.to(self.scale.dtype)
        return dataclasses.replace(self, scale=self.scale * factor)


def unpack(grads: Sequence[HeadGrads], part: str, dtype: torch.dtype) -> torch.Tensor | None:
    """Sum of ``scale * gradient`` over ``grads``, multiplied and added in float32 (float64), rounded once to ``dtype``.

    Args:
        grads: the terms of the sum.
        part: ``"hidden"``, ``"weight"`` or ``"bias"``.
        dtype: of the result.
    """
    found = [(tensor, term.scale.reshape(1)) for term in grads if (tensor := getattr(term, part)) is not None]
    if not found:
        return None
    tensor, scale = found[0]  # a 1-dim scale takes part in type promotion, so half-precision gradients are widened
    if len(found) == 1 and grads[0].fresh and tensor.dtype == dtype:
        return tensor.mul_(scale)
    if len(found) == 1:
        return torch.mul(tensor, scale, out=torch.empty_like(tensor, dtype=dtype))
    total = tensor * scale
    for tensor, scale in found[1:]:
        total += tensor * scale
    return total.to(dtype)
