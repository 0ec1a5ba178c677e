"""Experts sharded inside: each rank holds a slice of every expert's intermediate width.

Each rank sends every token through its slice of the experts the router chose, so nothing is exchanged between ranks but
the sum that a row-parallel layer makes anyway, and no rank can be busier than another (DeepSpeed-MoE, Rajbhandari et
al. 2022, calls it expert slicing).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from tp_plugin.collectives import reduce_from_region
from tp_plugin.errors import NO_FULLGRAPH
from tp_plugin.layers.partial import add_once
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh


class ParallelExperts(nn.Module):
    """Put *before* the class of an experts module, whose own forward computes with the shards.

    Its parameters are fused over the experts, ``[experts, ...]``; hidden states ``[tokens, hidden]`` and routing
    weights come in through the doors of a :class:`~tp_plugin.layers.region.Region`. The forward must be linear in the
    down projection from there to its result: its partial results are summed over the group, here or, where
    ``tp_partial``, by the block around it.
    """

    tp_mesh: ParallelMesh
    tp_layouts: dict[str, ShardLayout]
    tp_once: tuple[str, ...]  # replicated biases of the down projection
    tp_partial: bool

    def tp_setup(
        self, mesh: ParallelMesh, layouts: dict[str, ShardLayout], *, once: Sequence[str] = (), partial: bool = False
    ) -> None:
        """Fields for a module whose class has just become this one and whose parameters are shards already.

        Args:
            layouts: parameter name -> how it lies.
            once: names of replicated parameters that are added to the partial result, to be counted by one rank only.
            partial: leave the result partial, for a block that sums it with others.
        """
        self.tp_mesh, self.tp_layouts, self.tp_once, self.tp_partial = mesh, layouts, tuple(once), partial

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        out = self._tp_biased(*args, **kwargs) if self.tp_once else super().forward(*args, **kwargs)
        return out if self.tp_partial else reduce_from_region(out, self.tp_mesh.tp_group)

    @torch.compiler.disable(reason=NO_FULLGRAPH)
    def _tp_biased(self, *args: object, **kwargs: object) -> torch.Tensor:
        group = self.tp_mesh.tp_group
        with _stood_in(self, {name: add_once(getattr(self, name), group) for name in self.tp_once}):
            return super().forward(*args, **kwargs)

    def extra_repr(self) -> str:
        rank = f"{self.tp_mesh.tp_rank + 1}/{self.tp_mesh.tp_size}"
        whole = ", ".join(f"{name} {list(layout.shape)}" for name, layout in self.tp_layouts.items())
        return ", ".join(part for part in (super().extra_repr(), f"shard {rank} of {whole}") if part)


@contextlib.contextmanager
def _stood_in(module: nn.Module, values: dict[str, torch.Tensor]) -> Iterator[None]:
    """While this is open, ``module.name`` is another tensor than the parameter of that name, which stays registered."""
    module.__dict__.update(values)  # found before nn.Module looks among its parameters
    try:
        yield
    finally:
        for name in values:
            del module.__dict__[name]


def sum_at_exit(block: nn.Module, mesh: ParallelMesh) -> None:
    """Make the end of ``block`` the door out for the partial results it adds up.

    The block returns them as a tensor ``[..., hidden]`` or first in a tuple; they come out summed over the group.
    """

    @torch.compiler.disable
    def leave(_block: nn.Module, _args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return (reduce_from_region(output[0], mesh.tp_group), *output[1:])
        return reduce_from_region(output, mesh.tp_group)

    block.register_forward_hook(leave)
