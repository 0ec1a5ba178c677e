"""VocabParallelLogits: the logits of a sharded head that have not been computed yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from tp_plugin.errors import TensorParallelError
from tp_plugin.lazy import stamp
from tp_plugin.loss.parts import Head, Transform, Wanted
from tp_plugin.loss.vocab import VocabShard


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """What lazy logits are computed from; no tensor in it is tracked by autograd.

    Attributes:
        hidden: [..., H], the leading dimensions of the logits; in the dtype of the matrix product.
        weight: [v, H], this rank's rows. A detached tensor: it keeps its storage when ZeRO-3 releases the parameter.
        bias: [v] or None.
        vocab: which rows.
        transform: scale and soft cap met so far.
        source: the hidden states that the head was called with and their in-place version then.
        normalised: these are log-probabilities, the log-softmax of the logits.
        wanted: which of the three want a gradient.
        workspace_bytes: working memory of the loss; None for the default.
        stamp: the step stamp of the forward pass.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    vocab: VocabShard
    transform: Transform
    wanted: Wanted
    workspace_bytes: int | None
    stamp: int
    source: tuple[torch.Tensor, int]
    normalised: bool = False

    def head(self) -> Head:
        """The same as a matrix of rows."""
        flat = self.hidden.reshape(-1, self.hidden.shape[-1])
        return Head(flat, self.weight, self.bias, self.vocab, self.transform)


@dataclasses.dataclass
class Family:
    """Logits that would share memory had they been computed, and what became of those that were.

    Attributes:
        computed: full tensors that members or views of them may have changed in place, each with its version then.
    """

    computed: list[tuple[torch.Tensor, int]] = dataclasses.field(default_factory=list)

    def changed(self, own: torch.Tensor | None) -> bool:
        """Whether an in-place change happened to a tensor other than ``own``."""
        return any(full is not own and version_of(full) != version for full, version in self.computed)


def version_of(tensor: torch.Tensor) -> int:
    """The in-place version of a tensor; inference tensors have none."""
    return -1 if tensor.is_inference() else tensor._version


class VocabParallelLogits(torch.Tensor):
    """Logits [..., V] of a vocabulary-parallel head, computed when something needs their values, or never.

    What HuggingFace models do between head and loss (row slices, ``.float()``, ``.view(-1, V)``, scaling by a number,
    a tanh soft cap) is recorded; ``F.cross_entropy`` becomes the fused vocabulary-parallel loss; everything else
    computes the full logits of the whole group first, differentiable, and goes on with those. Any such computation
    is a collective call: all ranks of the group must make it.

    An in-place operation computes the logits, changes them, and turns this tensor into the changed ones.

    Raises, where used: TensorParallelError when an optimizer stepped since the forward pass, when a tensor that would
    share memory with this one was changed in place, and for what has no meaning on values that do not exist
    (``retain_grad``, hooks, ``autograd.grad`` with respect to them, ``data_ptr``, pickling).
    """

    _recipe: Recipe
    _family: Family
    _full: torch.Tensor | None  # the values, once this tensor was changed in place or gave out a view of them
    _followed: int  # the version of _full that this tensor's own autograd history knows of
    _tracked: bool  # whether autograd follows _full; if not, gradients go through this tensor's own grad_fn

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
        from tp_plugin.lazy.table import answer

        return answer(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What C++ does to outputs of other people's autograd Functions stays lazy."""
        this = args[0]
        same = func in _SAME or (func in _SHAPED and isinstance(this, cls) and tuple(args[1]) == tuple(this.shape))
        if isinstance(this, cls) and same:
            full = None if this._full is None else this._full.detach()
            return cls(this.shape, this.dtype, this._recipe, this._family, full)
        raise TensorParallelError(
            f"{func} met logits that have not been computed, in a place where they cannot be. Call "
            "logits.materialize() before."
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        state = "not computed" if self._full is None else "computed"
        return f"VocabParallelLogits(shape={tuple(self.shape)}, dtype={self.dtype}, {state})"

    def materialize(self) -> torch.Tensor:
        """The full logits, an ordinary differentiable tensor of this shape and dtype; a copy, and a collective call.

        Raises:
            TensorParallelError: an optimizer stepped since the forward pass, or memory-sharing logits were changed.
        """
        from tp_plugin.lazy.nodes import dense

        full = dense(self)
        return full if self._full is None else full.clone()

    def check_fresh(self) -> None:
        """Raise unless the values could still be computed as of the forward pass."""
        if self._full is None and self._recipe.stamp != stamp.current():
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
                "logits that would share memory with these (a view, a slice or a detached twin) were changed in place "
                "while these had not been computed, so the change is not seen here. Call logits.materialize() before "
                "taking views, or clone() before changing one."
            )


_SAME = {torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.lift_fresh.default}
_SHAPED = {torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.reshape.default}
