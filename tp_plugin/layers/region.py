"""Region: what lies between one door in (the column-parallel siblings' shared input) and one door out (the row).

``q, k, v -> attention -> o`` and ``gate, up -> act -> down`` are regions. Inside, tensors are sharded and every rank
computes something else; outside, they are replicated. One all-reduce leads out in forward and one in backward
(Megatron-LM, section 3).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from tp_plugin.collectives import copy_to_region
from tp_plugin.layers.dropout import DerivedRandomness
from tp_plugin.mesh import ParallelMesh


class Region:
    """The door that the column-parallel siblings of one block share, and the randomness inside.

    The door belongs to the columns' input, not to the block: whatever else reads the block's input (a router, a
    LoRA A) stays outside. Siblings find each other by the tensor they are called with, the same object or another view
    of all its elements, so the first copies it and the others reuse the copy; its backward then reduces the sum of
    their gradients once. A sibling that gets another tensor simply makes a door of its own: still right, one more
    collective.
    """

    def __init__(self, mesh: ParallelMesh, parent: nn.Module, *, derive_randomness: bool = True) -> None:
        self.group = mesh.tp_group
        self.random = DerivedRandomness(parent, mesh.tp_rank) if derive_randomness else None
        self._inside: set[nn.Module] = set()  # columns whose wrapper is under way and has used the door
        self._source: torch.Tensor | None = None
        self._version = 0  # of the source, when it entered
        self._entered: torch.Tensor | None = None  # kept until the row or the block is left: linears save views
        parent.register_forward_hook(self._after_parent, always_call=True)

    def __deepcopy__(self, memo: dict) -> Region:
        return self  # a copy of a column or a row (PEFT's modules_to_save) goes through the same door

    def admit(self, column: nn.Module) -> None:
        """Make this the door of ``column``.

        A pre-hook, and the first one: ZeRO-3 wraps the input in a new tensor for every module, which would hide
        from the siblings that it is the same.
        """
        column.tp_region = self  # type: ignore[assignment]
        column.register_forward_pre_hook(self._before_column, prepend=True)

    def admit_around(self, wrapper: nn.Module, column: nn.Module) -> None:
        """Let ``wrapper``, which calls ``column`` with its own input, in by the door, once for both.

        What else it does with its input (a LoRA A) is inside then. ``column`` keeps its door, for whoever calls it
        without the wrapper later on.
        """

        @torch.compiler.disable
        def enter(_wrapper: nn.Module, args: tuple) -> tuple:
            found = self._before_column(column, args)
            self._inside.add(column)
            return found or args

        @torch.compiler.disable
        def leave(*_: object) -> None:
            self._inside.discard(column)

        wrapper.register_forward_pre_hook(enter, prepend=True)
        wrapper.register_forward_hook(leave, always_call=True)

    def admit_experts(self, experts: nn.Module) -> None:
        """Make this the door of ``experts``, which are called with hidden states and routing weights.

        The router stays outside. Its weights multiply partial results, so their gradient is partial on each rank too:
        they come in through a door of their own.
        """
        experts.register_forward_pre_hook(self._before_experts, with_kwargs=True, prepend=True)

    def release(self, row: nn.Module) -> None:
        """Make ``row`` the module that leaves the region."""
        row.register_forward_pre_hook(self._before_row, prepend=True)

    @torch.compiler.disable
    def _before_column(self, column: nn.Module, args: tuple) -> tuple | None:
        if column in self._inside:
            return None
        if self.random is not None:
            self.random.start(args[0].device)
        return (self._enter(args[0]), *args[1:])

    @torch.compiler.disable
    def _before_experts(self, _experts: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        values, structure = tree_flatten((args, kwargs))
        hidden, *weights = (i for i, x in enumerate(values) if isinstance(x, torch.Tensor) and x.is_floating_point())
        values[hidden] = self._enter(values[hidden])
        for index in weights:
            values[index] = copy_to_region(values[index], self.group)
        return tree_unflatten(values, structure)

    def _enter(self, x: torch.Tensor) -> torch.Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        if self._entered is None or not self._knows(x):
            self._source, self._version, self._entered = x, x._version, copy_to_region(x, self.group)
        return self._entered if self._entered.shape == x.shape else self._entered.view(x.shape)

    def _knows(self, x: torch.Tensor) -> bool:
        """Whether ``x`` shows the elements that entered, in the same order, and none was changed in between."""
        known = self._source
        if known is None or x._version != self._version:
            return False
        if known is x:
            return True
        base, other = (t._base if t._is_view() else t for t in (known, x))
        return (
            base is other
            and known.data_ptr() == x.data_ptr()
            and known.numel() == x.numel()
            and known.dtype == x.dtype
            and known.is_contiguous()
            and x.is_contiguous()
        )

    @torch.compiler.disable
    def _before_row(self, _row: nn.Module, _args: tuple) -> None:
        self._leave()

    @torch.compiler.disable
    def _after_parent(self, *_: object) -> None:
        self._leave()  # also on the exception with which checkpointing leaves a recomputation early

    def _leave(self) -> None:
        self._source = self._entered = None
        if self.random is not None:
            self.random.stop()
