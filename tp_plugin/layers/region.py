"""Region: the modules from column-parallel siblings, which share an input, to the row-parallel layer behind them.

``q, k, v -> attention -> o`` and ``gate, up -> act -> down`` are regions. Inside, tensors are sharded; outside, they
are replicated. One all-reduce leaves it in forward and one in backward (Megatron-LM, section 3).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from tp_plugin.layers.boundary import Boundary
from tp_plugin.layers.dropout import DerivedRandomness
from tp_plugin.mesh import ParallelMesh


class Region:
    """The entry that the column-parallel siblings of one block share, and the random numbers inside.

    Only the columns' input enters, not the block's: its other readers (a router, a LoRA A) stay outside. The first
    sibling lets its input enter. The others find it by the tensor they are called with, the same object or another
    view of all its elements. So the sum of their gradients is reduced once. A sibling with another tensor enters by
    itself: equally right, one more collective.
    """

    def __init__(self, mesh: ParallelMesh, parent: nn.Module, *, derive_randomness: bool = True) -> None:
        self.boundary = Boundary(mesh)
        self.random = DerivedRandomness(parent, mesh.tp_rank) if derive_randomness else None
        self._inside: set[nn.Module] = set()  # columns whose wrapper is running and has entered for them
        self._source: torch.Tensor | None = None
        self._version = 0  # of the source, on entry
        self._entered: torch.Tensor | None = None  # kept until the row starts or the block ends: linears save views
        parent.register_forward_hook(self._after_parent, always_call=True)

    def __deepcopy__(self, memo: dict) -> Region:
        return self  # a copy of a column or a row (PEFT's modules_to_save) is in the same region

    def attach_input(self, column: nn.Module) -> None:
        """Let the input of ``column`` enter.

        The pre-hook is the first one: ZeRO-3 wraps the input in a new tensor for every module, so siblings would not
        find it.
        """
        column.tp_region = self  # type: ignore[assignment]
        column.register_forward_pre_hook(self._before_column, prepend=True)

    def attach_input_around(self, wrapper: nn.Module, column: nn.Module) -> None:
        """Let the input of ``wrapper``, which calls ``column`` with it, enter once for both.

        The wrapper's other modules (a LoRA A) are then inside. A call of ``column`` without it enters as before.
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

    def attach_experts(self, experts: nn.Module) -> None:
        """Let the inputs of ``experts`` enter: hidden states and routing weights.

        The router stays outside. Its weights multiply partial results, so their gradient is partial on each rank too.
        """
        experts.register_forward_pre_hook(self._before_experts, with_kwargs=True, prepend=True)

    def attach_output(self, row: nn.Module) -> None:
        """End the region at ``row``."""
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
            values[index] = self.boundary.enter(values[index])
        return tree_unflatten(values, structure)

    def _enter(self, x: torch.Tensor) -> torch.Tensor:
        if self.boundary.enters_unchanged(x):
            return x
        if self._entered is None or not self._knows(x):
            self._source, self._version, self._entered = x, x._version, self.boundary.enter(x)
        return self._entered if self._entered.shape == x.shape else self._entered.view(x.shape)

    def _knows(self, x: torch.Tensor) -> bool:
        """True if ``x`` has the elements that entered, in the same order, unchanged since."""
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
        self._leave()  # also on the exception by which checkpointing ends a recomputation early

    def _leave(self) -> None:
        self._source = self._entered = None
        if self.random is not None:
            self.random.stop()
