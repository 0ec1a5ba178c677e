"""Experts sharded inside: each rank holds a slice of every expert's intermediate width.

Each rank sends every token through its slice of the chosen experts. The group exchanges only a row-parallel
layer's sum, and no rank is busier than another (expert slicing in DeepSpeed-MoE, Rajbhandari et al. 2022).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from tp_plugin.errors import NO_FULLGRAPH
from tp_plugin.layers.boundary import Boundary
from tp_plugin.layers.instance_forwards import become
from tp_plugin.layers.parallel_layer import joined, shard_repr
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh


class ParallelExperts(nn.Module):
    """A base *before* the class of an experts module, whose own forward computes with the shards.

    Its parameters are fused over the experts, ``[experts, ...]``; hidden states ``[tokens, hidden]`` and routing
    weights enter through a :class:`~tp_plugin.layers.region.Region`. The forward must be linear from the
    down projection to its result: partial results are summed over the group, here or, where ``tp_partial``, by the
    block around it.
    """

    tp_mesh: ParallelMesh
    tp_boundary: Boundary
    tp_layouts: dict[str, ShardLayout]
    tp_once: tuple[str, ...]  # replicated biases of the down projection
    tp_partial: bool

    @classmethod
    def convert(
        cls, module: nn.Module, layouts: Mapping[str, ShardLayout], mesh: ParallelMesh, *, partial: bool = False
    ) -> None:
        """Make ``module``, whose parameters are this rank's shards already, experts of this class.

        Args:
            layouts: parameter name -> layout; parameters without one are added to the partial result, on one rank.
            partial: leave the result partial, for a block that sums it with others.
        """
        original = type(module)
        become(module, joined(f"{cls.__name__}Of{original.__name__}", cls, original))
        experts: Any = module
        experts.tp_mesh, experts.tp_boundary, experts.tp_layouts = mesh, Boundary(mesh), dict(layouts)
        experts.tp_once = tuple(leaf for leaf, _ in module.named_parameters() if leaf not in layouts)
        experts.tp_partial = partial

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        out = self._tp_biased(*args, **kwargs) if self.tp_once else super().forward(*args, **kwargs)
        return out if self.tp_partial else self.tp_boundary.leave(out)

    @torch.compiler.disable(reason=NO_FULLGRAPH)
    def _tp_biased(self, *args: object, **kwargs: object) -> torch.Tensor:
        with _replaced(self, {name: self.tp_boundary.add_once(getattr(self, name)) for name in self.tp_once}):
            return super().forward(*args, **kwargs)

    def extra_repr(self) -> str:
        full = ", ".join(f"{name} {list(layout.shape)}" for name, layout in self.tp_layouts.items())
        return ", ".join(part for part in (super().extra_repr(), f"{shard_repr(self.tp_mesh)} of {full}") if part)


@contextlib.contextmanager
def _replaced(module: nn.Module, values: dict[str, torch.Tensor]) -> Iterator[None]:
    """Make ``module.name`` another tensor than the parameter of that name, which stays registered."""
    module.__dict__.update(values)  # found before nn.Module looks among its parameters
    try:
        yield
    finally:
        for name in values:
            del module.__dict__[name]
