"""Adapters: what another library put around the modules of a model, out of the way while the model itself is sharded.

A plan speaks of the model as transformers built it. So adapters are taken out for as long as it is made and applied,
put back, and then laid out each by the module it adapts. What a library's adapters look like is that library's
integration's business, which introduces itself with :func:`introduce`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from tp_plugin.errors import TensorParallelError
from tp_plugin.layers import sum_shared_gradient
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh
from tp_plugin.plans import Plan

Twins = Sequence[tuple[str, nn.Module]]
"""Copies that are trained in the place of modules: (full name of the module, its copy)."""


class Library(Protocol):
    """A library of adapters."""

    def bare(self, model: nn.Module) -> nn.Module | None:
        """The model that the library's adapters in ``model`` adapt; None if there are none of them."""

    def obstacle(self, model: nn.Module) -> str | None:
        """Why adapters in ``model`` cannot be sharded whatever the plan; None if they can."""

    def objection(self, bare: nn.Module, plan: Plan) -> str | None:
        """Which adapter does not go with what ``plan`` makes of its module, and what to do; None if all do."""

    def taken_out(self, bare: nn.Module) -> contextlib.AbstractContextManager[Twins]:
        """While open, every module stands where its adapter stood; gives the copies that adapters hold."""

    def lay(self, bare: nn.Module, mesh: ParallelMesh) -> None:
        """Shard the adapters, whose modules are sharded. What was laid before is left as it is."""


_LIBRARIES: list[Library] = []


def introduce(library: Library) -> None:
    """Let models with the adapters of ``library`` be sharded."""
    if library not in _LIBRARIES:
        _LIBRARIES.append(library)


def of(model: nn.Module) -> Library | None:
    """Whose adapters are in ``model``; None if nobody's."""
    return next((library for library in _LIBRARIES if library.bare(model) is not None), None)


def bare_of(model: nn.Module) -> nn.Module:
    """The model that is adapted in ``model``; ``model`` itself if none is."""
    library = of(model)
    found = None if library is None else library.bare(model)
    return model if found is None else found


@contextlib.contextmanager
def taken_out(model: nn.Module):  # type: ignore[no-untyped-def]
    """The bare model inside ``model`` and the twins of its modules, as (model, twins)."""
    library, bare = of(model), bare_of(model)
    if library is None:
        yield bare, ()
        return
    with library.taken_out(bare) as twins:
        yield bare, twins


@torch.no_grad()
def cut(param: nn.Parameter, layout: ShardLayout, mesh: ParallelMesh) -> None:
    """Replace the data of ``param``, the full tensor, by this rank's shard."""
    if tuple(param.shape) != layout.shape:
        raise TensorParallelError(f"a parameter of shape {tuple(param.shape)} is to be laid as {layout.shape}.")
    shard = layout.shard(param.data, mesh.tp_rank)
    param.data = shard.clone() if shard.data_ptr() == param.data.data_ptr() else shard


def note(param: nn.Parameter, layout: ShardLayout, mesh: ParallelMesh) -> None:
    """Remember how ``param``, a shard, lies; the gradient of what other ranks hold too is summed from then on."""
    param.tp_layout = layout  # type: ignore[attr-defined]
    # Megatron's flag, which DeepSpeed's gradient norm asks: this rank counts the parameter. Rank 0 always
    # counts, so a replica's owner is the lowest rank that holds it.
    param.tensor_model_parallel = not layout.owns_none(mesh.tp_rank)  # type: ignore[attr-defined]
    if layout.shared_intervals():
        sum_shared_gradient(param, layout, mesh)
