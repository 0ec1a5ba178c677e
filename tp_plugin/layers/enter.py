"""Replicated modules whose output is met inside a sharded region, without passing a column."""

from __future__ import annotations

import torch
from torch import nn

from tp_plugin.collectives import copy_to_region
from tp_plugin.mesh import ParallelMesh


def enter_after(module: nn.Module, mesh: ParallelMesh, tail: int | None = None) -> None:
    """Make the output of ``module`` a door: its gradient, partial on each rank, is summed over the TP group.

    Args:
        module: gives ``[..., n]``.
        tail: only the last so many of the ``n`` enter, the others go on replicated (the key that the heads of a latent
            attention share); None for all.
    """

    module.tp_enters = mesh, tail  # type: ignore[assignment]

    @torch.compiler.disable
    def enter(_module: nn.Module, _args: tuple, output: torch.Tensor) -> torch.Tensor:
        if tail is None:
            return copy_to_region(output, mesh.tp_group)
        rest, entering = output.split([output.shape[-1] - tail, tail], -1)
        return torch.cat([rest, copy_to_region(entering, mesh.tp_group)], -1)

    module.register_forward_hook(enter)


def count_once(module: nn.Module, mesh: ParallelMesh) -> None:
    """Let the group's first rank alone count the output of ``module``, which is part of a partial result.

    On the others it is zeros, with a gradient of zeros: what it is made of comes through a door that sums over the
    ranks. (Without any gradient, ZeRO-3 would see other modules in the backward of those ranks.)
    """

    @torch.compiler.disable
    def count(_module: nn.Module, _args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output if mesh.tp_rank == 0 else output * 0

    module.register_forward_hook(count)
