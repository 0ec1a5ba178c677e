"""Recipe: the factors that lazy logits are computed from, and what is computed from them on this rank.

A recipe remembers the number of optimizer steps at its forward pass. Logits computed after a later step would
silently come from the new weights, so they refuse.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from tp_plugin.loss.implementations import block_for
from tp_plugin.loss.job import Goal, Job, Setup, workspace_or_default
from tp_plugin.loss.parts import Head, Options, Transform, Wanted, wide_of
from tp_plugin.loss.vocab import VocabShard


class StepCount:
    """The number of changes to the weights that this process has seen, nearly always optimizer steps."""

    def __init__(self) -> None:
        self.value = 0
        self._handle: RemovableHandle | None = None

    def increase(self, *_: Any) -> None:
        """Note a change of the weights. For code that changes them without a ``torch.optim.Optimizer``."""
        self.value += 1

    def install(self) -> None:
        """Count each step of each ``torch.optim.Optimizer`` from now on; a second call does nothing."""
        if self._handle is None:
            self._handle = register_optimizer_step_post_hook(self.increase)


STEPS = StepCount()
"""One a process, as torch's hook for all optimizers is."""


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """Factors of lazy logits; autograd tracks none of the tensors.

    Attributes:
        hidden: [..., H], the leading dimensions of the logits; in the dtype of the matrix product.
        weight: [v, H], this rank's rows. A detached tensor: it keeps its storage when ZeRO-3 releases the parameter.
        bias: [v] or None.
        vocab: which rows.
        transform: the scale and soft cap recorded so far.
        wanted: which of the three want a gradient.
        workspace_bytes: working memory of the loss; None for the default.
        step: ``STEPS.value`` at the forward pass.
        source: the hidden states that the head was called with, and their in-place version then.
        normalised: these are log-probabilities, the log-softmax of the logits.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    vocab: VocabShard
    transform: Transform
    wanted: Wanted
    workspace_bytes: int | None
    step: int
    source: tuple[torch.Tensor, int]
    normalised: bool = False

    def head(self) -> Head:
        """The same factors, with hidden states [N, H]."""
        flat = self.hidden.reshape(-1, self.hidden.shape[-1])
        return Head(flat, self.weight, self.bias, self.vocab, self.transform)

    def job(self, goal: Goal, options: Options, *, exact: bool = False) -> Job:
        """The loss of these logits, [N, V]; ``exact``: of products that are not rounded to half precision."""
        head = self.head()
        block = block_for("auto", head.hidden.device, head.hidden.dtype, head.vocab.group)
        kept = head.wide if exact else None
        setup = Setup(self.vocab, options, self.transform, kept, self.workspace_bytes, block)
        return setup.job(head.hidden, head.weight, head.bias, goal)

    def own_logits(self, hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """This rank's columns [..., v] of the logits of ``hidden`` [..., H], rounded as plain ones are; not a view."""
        with torch.autocast(hidden.device.type, enabled=False):
            own = hidden.new_empty((*hidden.shape[:-1], self.vocab.rows))
            flat = hidden.reshape(-1, hidden.shape[-1])
            rows = own.view(flat.shape[0], self.vocab.rows)
            if self.bias is None:
                torch.mm(flat, self.weight.t(), out=rows)
            else:
                torch.addmm(self.bias, flat, self.weight.t(), out=rows)
            if not self.transform.identity:
                own = self.transform.apply_(own.to(wide_of(own.dtype)))
            return own.to(dtype)

    def rows_within(self, columns: int) -> int:
        """Number of rows of ``columns`` numbers, three copies of 8 bytes each, that fit into the working memory."""
        budget = workspace_or_default(self.workspace_bytes, self.hidden.device)
        return max(1, budget // max(1, 24 * columns))


@dataclasses.dataclass
class Family:
    """Logits that would share memory had they been computed, and the computed tensors among them.

    Attributes:
        computed: full tensors that members or views of them may have changed in place, each with its version then.
    """

    computed: list[tuple[torch.Tensor, int]] = dataclasses.field(default_factory=list)

    def changed(self, own: torch.Tensor | None) -> bool:
        """True if a tensor other than ``own`` was changed in place."""
        return any(full is not own and version_of(full) != version for full, version in self.computed)


def version_of(tensor: torch.Tensor) -> int:
    """The in-place version of a tensor; inference tensors have none."""
    return -1 if tensor.is_inference() else tensor._version
