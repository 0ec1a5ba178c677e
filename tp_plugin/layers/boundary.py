"""Boundary: the one way in and out of a tensor-parallel region.

Outside, activations are equal on all ranks of the TP group. Inside, each rank computes with its shards, so results and
the gradients of replicated inputs are partial (Megatron-LM, Shoeybi et al. 2019, section 3)::

                 enter                                                leave
    forward   x ─ identity ───> column-parallel ─> row-parallel ─ all-reduce ─> y
    backward dx <─ all-reduce ─ column-parallel <─ row-parallel <─ identity ── dy

Layers, regions, experts, adapters, embedding and head call it and no collective of their own at these places. Another
mode, with activations outside sharded over the sequence, would change the methods of this class only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tp_plugin.collectives import copy_to_region, gather_from_region, reduce_from_region, split_to_region
from tp_plugin.layers.partial_gradients import add_once
from tp_plugin.mesh import ParallelMesh


class Boundary:
    """Ways in and out of the regions over one mesh's TP group.

    Tensors have any shape ``[..., n]``; ``sizes`` are all ranks' extents along the last dimension.
    """

    def __init__(self, mesh: ParallelMesh) -> None:
        self.mesh, self.group = mesh, mesh.tp_group

    # ---- tensors -------------------------------------------------------------------------------------------------

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """forward: identity; backward: all-reduce of the partial gradients."""
        return copy_to_region(x, self.group)

    def enters_unchanged(self, x: torch.Tensor) -> bool:
        """True if :meth:`enter` is not needed for ``x``: no gradient will come back."""
        return not (torch.is_grad_enabled() and x.requires_grad)

    def enter_summed(self, x: torch.Tensor) -> torch.Tensor:
        """Enter a consumer that sums its input's gradient itself, as the head does; forward, backward: identity."""
        return x

    def enter_split(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """forward: this rank's part of the last dimension; backward: all-gather of the parts' gradients."""
        return split_to_region(x, self.group, -1, sizes)

    def leave(self, partial: torch.Tensor) -> torch.Tensor:
        """forward: all-reduce of the partial results, in place; backward: identity."""
        return reduce_from_region(partial, self.group)

    def leave_gathered(self, shard: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """forward: all-gather along the last dimension; backward: this rank's part of the gradient."""
        return gather_from_region(shard, self.group, -1, sizes)

    def add_once(self, x: torch.Tensor) -> torch.Tensor:
        """A replicated summand of a partial result; forward: zeros except on TP rank 0, backward: identity."""
        return add_once(x, self.group)

    # ---- modules -------------------------------------------------------------------------------------------------

    def enter_after(self, module: nn.Module, tail: int | None = None) -> None:
        """Let the output of a replicated ``module`` enter: a sharded region reads it without a column in between.

        Args:
            module: returns ``[..., n]``.
            tail: only the last ``tail`` of the ``n`` enter, the others stay outside (the key that the heads of a
                latent attention share); None for all.
        """
        module.tp_entry = self, tail  # type: ignore[assignment]

        @torch.compiler.disable
        def enter(_module: nn.Module, _args: tuple, output: torch.Tensor) -> torch.Tensor:
            if tail is None:
                return self.enter(output)
            rest, entering = output.split([output.shape[-1] - tail, tail], -1)
            return torch.cat([rest, self.enter(entering)], -1)

        module.register_forward_hook(enter)

    def leave_after(self, block: nn.Module) -> None:
        """Let the partial result of ``block`` leave: a tensor ``[..., hidden]``, or the first of a tuple."""

        @torch.compiler.disable
        def leave(_block: nn.Module, _args: tuple, output: Any) -> Any:
            if isinstance(output, tuple):
                return (self.leave(output[0]), *output[1:])
            return self.leave(output)

        block.register_forward_hook(leave)

    def rank0_only(self, module: nn.Module) -> None:
        """Count the output of ``module``, a summand of a partial result, on TP rank 0 only.

        The other ranks return zeros, with a gradient of zeros: the module's input has entered, so its gradient is
        summed. (Without any gradient, ZeRO-3 would see other modules in the backward of those ranks.)
        """

        @torch.compiler.disable
        def count(_module: nn.Module, _args: tuple, output: torch.Tensor) -> torch.Tensor:
            return output if self.mesh.tp_rank == 0 else output * 0

        module.register_forward_hook(count)
