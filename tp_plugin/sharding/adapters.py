"""Adapters that another library put around the modules of a model.

A plan describes the model as transformers built it. So adapters are taken out while a plan is made and applied, put
back, and then sharded each like the module it adapts. An integration registers its library with :func:`introduce`.
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
from tp_plugin.param_info import update_info
from tp_plugin.plans import Plan

TrainedCopies = Sequence[tuple[str, nn.Module]]
"""Copies that adapters train in the place of modules: (full name of the module, its copy)."""


class Library(Protocol):
    """A library of adapters."""

    def bare(self, model: nn.Module) -> nn.Module | None:
        """The model that the library's adapters in ``model`` adapt; None if there are none of them."""

    def obstacle(self, model: nn.Module) -> str | None:
        """Error text about adapters that no plan can shard; None if there are none."""

    def objection(self, bare: nn.Module, plan: Plan) -> str | None:
        """Error text about an adapter that ``plan`` cannot shard with its module; None if there is none."""

    def taken_out(self, bare: nn.Module) -> contextlib.AbstractContextManager[TrainedCopies]:
        """Put every module in the place of its adapter while open; yields the copies that adapters hold."""

    def shard_adapters(self, bare: nn.Module, mesh: ParallelMesh) -> None:
        """Shard the adapters of sharded modules. Adapters that are sharded already are left as they are."""


_LIBRARIES: list[Library] = []


def introduce(library: Library) -> None:
    """Let models with the adapters of ``library`` be sharded."""
    if library not in _LIBRARIES:
        _LIBRARIES.append(library)


def of(model: nn.Module) -> Library | None:
    """The library whose adapters are in ``model``; None if it has no adapters."""
    return next((library for library in _LIBRARIES if library.bare(model) is not None), None)


def bare_of(model: nn.Module) -> nn.Module:
    """The model without adapters; ``model`` itself if it has none."""
    library = of(model)
    found = None if library is None else library.bare(model)
    return model if found is None else found


@contextlib.contextmanager
def taken_out(model: nn.Module):  # type: ignore[no-untyped-def]
    """Take adapters out while open; yields (bare model, trained copies of its modules)."""
    library, bare = of(model), bare_of(model)
    if library is None:
        yield bare, ()
        return
    with library.taken_out(bare) as copies:
        yield bare, copies


@torch.no_grad()
def shard_param_(param: nn.Parameter, layout: ShardLayout, mesh: ParallelMesh) -> None:
    """Replace the data of ``param``, the full tensor, by this rank's shard."""
    if tuple(param.shape) != layout.shape:
        raise TensorParallelError(
            f"a parameter of shape {tuple(param.shape)} cannot have the layout of shape {layout.shape}."
        )
    shard = layout.shard(param.data, mesh.tp_rank)
    param.data = shard.clone() if shard.data_ptr() == param.data.data_ptr() else shard


def attach_layout(param: nn.Parameter, layout: ShardLayout, mesh: ParallelMesh) -> None:
    """Note the layout of ``param``, a shard; the gradient of indices that other ranks have is summed from now on."""
    update_info(param, layout=layout)
    # Megatron's flag, read by DeepSpeed's gradient norm: this rank counts the parameter. DeepSpeed counts all of
    # rank 0's, so the owner of a replica is the lowest rank.
    param.tensor_model_parallel = not layout.owns_none(mesh.tp_rank)  # type: ignore[attr-defined]
    if layout.shared_intervals():
        sum_shared_gradient(param, layout, mesh)
