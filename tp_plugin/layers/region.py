"""Region: what lies between one door in (the column-parallel siblings' shared input) and one door out (the row).

``q, k, v -> attention -> o`` and ``gate, up -> act -> down`` are regions. Inside, tensors are sharded and every rank
computes something else; outside, they are replicated. One all-reduce leads out in forward and one in backward
(Megatron-LM, section 3).
"""

from __future__ import annotations

import weakref

import torch
from torch import nn

from tp_plugin.collectives import copy_to_region
from tp_plugin.layers.dropout import DerivedRandomness
from tp_plugin.mesh import ParallelMesh


class Region:
    """The door that the column-parallel siblings of one block share, and the randomness inside.

    The door belongs to the columns' input, not to the block: whatever else reads the block's input (a router, a
    LoRA A) stays outside. Siblings find each other by the identity of the tensor object they are called with, so the
    first copies it and the others reuse the copy; its backward then reduces the sum of their gradients once. A sibling
    that gets another tensor simply makes a door of its own: still right, one more collective.
    """

    def __init__(self, mesh: ParallelMesh, parent: nn.Module, *, derive_randomness: bool = True) -> None:
        self.group = mesh.tp_group
        self.random = DerivedRandomness(parent, mesh.tp_rank) if derive_randomness else None
        self._source: weakref.ref[torch.Tensor] | None = None
        self._entered: torch.Tensor | None = None  # strong, until the row or the block is left: linears save views
        parent.register_forward_hook(self._after_parent, always_call=True)

    def admit(self, column: nn.Module) -> None:
        """Make this the door of ``column``.

        A pre-hook, and the first one: ZeRO-3 wraps the input in a new tensor for every module, which would hide
        from the siblings that it is the same.
        """
        column.register_forward_pre_hook(self._before_column, prepend=True)

    def release(self, row: nn.Module) -> None:
        """Make ``row`` the module that leaves the region."""
        row.register_forward_pre_hook(self._before_row, prepend=True)

    @torch.compiler.disable
    def _before_column(self, _column: nn.Module, args: tuple) -> tuple:
        if self.random is not None:
            self.random.start(args[0].device)
        return (self._enter(args[0]), *args[1:])

    def _enter(self, x: torch.Tensor) -> torch.Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        if self._entered is None or self._source is None or self._source() is not x:
            self._source, self._entered = weakref.ref(x), copy_to_region(x, self.group)
        return self._entered

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
