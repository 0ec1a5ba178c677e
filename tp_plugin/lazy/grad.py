"""FactoredGrad: the gradient of logits that were never computed, as gradients of what they would be computed from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tp_plugin.errors import TensorParallelError
from tp_plugin.loss.parts import HeadGrads

aten = torch.ops.aten
SAME = {aten.detach.default, aten.alias.default, aten.lift_fresh.default}
SHAPED = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
_ADD = {aten.add.Tensor, aten.add_.Tensor}
_MUL = {aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar, aten.mul_.Scalar}
_DIV = {aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar, aten.div_.Scalar}
_IN_PLACE = {op for op in _ADD | _MUL | _DIV if op._schema.name.endswith("_")}


class FactoredGrad(torch.Tensor):
    """The gradient of lazy logits, carried as gradients of their hidden states, weight rows and bias.

    It has the shape, dtype and device of the logits, so autograd and other libraries' identity Functions pass it on.
    It has no storage. Supported are addition of its kind, scaling by a number or a 0-dim tensor, detach, clone and
    alias. Any other operation raises a TensorParallelError that names it.

    Attributes:
        terms: gradients to be added up when they are unpacked; the hidden gradients have the leading dimensions of
            the logits.
    """

    terms: tuple[HeadGrads, ...]

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device, terms: tuple[HeadGrads, ...]
    ) -> FactoredGrad:
        grad = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        grad.terms = terms
        return grad

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        this = args[0]
        terms: tuple[HeadGrads, ...] | None = None
        if not isinstance(this, cls):
            if func in _ADD | _MUL and isinstance(args[1], cls) and not kwargs and not func._schema.name.endswith("_"):
                return cls.__torch_dispatch__(func, types, (args[1], this))  # both commute
        elif func in SAME or func is aten.clone.default or (func in SHAPED and tuple(args[1]) == tuple(this.shape)):
            terms = this.terms
        elif func is aten._to_copy.default and set(kwargs) <= {"dtype"}:
            return cls(this.shape, kwargs.get("dtype") or this.dtype, this.device, this.terms)
        elif func in _ADD and isinstance(args[1], cls):
            alpha = kwargs.get("alpha", 1)
            terms = this.terms + tuple(term.scaled(alpha) for term in args[1].terms)
        elif func in _MUL | _DIV and not kwargs and _is_scalar(args[1]):
            factor = args[1] if func in _MUL else 1.0 / _wide(args[1])
            terms = tuple(term.scaled(factor) for term in this.terms)
        elif func is aten.neg.default:
            terms = tuple(term.scaled(-1.0) for term in this.terms)
        if terms is None:
            raise TensorParallelError(
                f"{func} cannot read the gradient of logits that were never computed. It is kept factored and can "
                "only be passed on, added to its kind or scaled by a number. Call logits.materialize() before the "
                "operation that needs their full gradient."
            )
        if func in _IN_PLACE:
            this.terms = terms
            return this
        return cls(this.shape, this.dtype, this.device, terms)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"FactoredGrad(shape={tuple(self.shape)}, dtype={self.dtype}, terms={len(self.terms)})"

    def relabelled(
        self, shape: Sequence[int], dtype: torch.dtype, pull: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> FactoredGrad:
        """The gradient of logits of another shape and dtype; ``pull`` maps the hidden gradients."""
        terms = self.terms
        if pull is not None:
            terms = tuple(
                term if term.hidden is None else dataclasses.replace(term, hidden=pull(term.hidden)) for term in terms
            )
        return FactoredGrad(shape, dtype, self.device, terms)


def _is_scalar(x: Any) -> bool:
    return isinstance(x, int | float) or (type(x) is torch.Tensor and x.dim() == 0)


def _wide(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) else x


def expect_factored(grad: torch.Tensor) -> FactoredGrad:
    """Return a factored ``grad``; refuse a dense one.

    Raises:
        TensorParallelError: a dense gradient, which only code that treats logits as numbers can have made.
    """
    if isinstance(grad, FactoredGrad):
        return grad
    raise TensorParallelError(
        f"a dense gradient of type {type(grad).__name__} came back to logits that were never computed, from an "
        "autograd Function that read them. Call logits.materialize() before that Function."
    )
