"""ParallelLayer: the base of the sharded layers, each of which converts the module it replaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from tp_plugin.layers.boundary import Boundary
from tp_plugin.layers.instance_forwards import become
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh


class ParallelLayer(nn.Module):
    """A module that computes with this rank's shard of its weight.

    It is put in place by changing a module's class, so the module, its ``nn.Parameter`` objects and their names stay.
    """

    tp_mesh: ParallelMesh
    tp_layout: ShardLayout  # of the weight
    tp_boundary: Boundary
    tp_replaces: ClassVar[type[nn.Module] | None] = None  # subclasses of it keep a forward of their own
    tp_hideable: ClassVar[bool] = False  # a forward set on the instance may hide this class's

    @classmethod
    def convert(
        cls, module: nn.Module, layout: ShardLayout, mesh: ParallelMesh, *, equivalent: bool = False, **options: Any
    ) -> None:
        """Make ``module``, whose parameters are this rank's shards already, a layer of this class.

        Args:
            layout: of the weight.
            equivalent: the forward of the module's class computes what that of :attr:`tp_replaces` does.
            options: see ``tp_setup`` of the class.

        Raises:
            TensorParallelError: a forward set on the instance hides this class's.
        """
        layer: Any = module
        if equivalent and not isinstance(module, nn.Linear):
            _complete(layer)
        become(module, cls._tp_class_for(module, equivalent), hideable=cls.tp_hideable)
        layer.tp_mesh, layer.tp_layout, layer.tp_boundary = mesh, layout, Boundary(mesh)
        layer.tp_setup(**options)

    @classmethod
    def _tp_class_for(cls, module: nn.Module, equivalent: bool) -> type[nn.Module]:
        """This class; for a subclass with a forward of its own, that subclass with this class behind it."""
        original = type(module)
        if equivalent or cls.tp_replaces in (None, original):
            return cls
        return joined(f"{cls.__name__}Of{original.__name__}", original, cls)

    def tp_setup(self) -> None:
        """Set the fields of a module whose class has just become this one."""

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {shard_repr(self.tp_mesh)} of {list(self.tp_layout.shape)}"


def _complete(layer: Any) -> None:
    """Set what ``nn.Linear`` has and a class that computes the same may lack: sizes, and a bias that may be None."""
    layer.out_features, layer.in_features = layer.weight.shape
    if "bias" not in layer._parameters:
        vars(layer).pop("bias", None)
        layer.register_parameter("bias", None)


_JOINED: dict[tuple[type[nn.Module], ...], type[nn.Module]] = {}


def joined(name: str, *bases: type[nn.Module]) -> type[nn.Module]:
    """The class ``name`` with these bases, made once, so that modules of one class stay modules of one class."""
    if bases not in _JOINED:
        _JOINED[bases] = type(name, bases, {})
    return _JOINED[bases]


def shard_repr(mesh: ParallelMesh) -> str:
    """This rank's place in the TP group, for ``print(model)``."""
    return f"shard {mesh.tp_rank + 1}/{mesh.tp_size}"


def in_place(outputs: Sequence[int]) -> bool:
    """Return True if these are all heads of this rank, each once and in order."""
    return list(outputs) == list(range(len(outputs)))


def take_heads(x: torch.Tensor, outputs: Sequence[int]) -> torch.Tensor:
    """Heads by number along the last dimension, which has ``max(outputs) + 1`` of them: ``[..., n * head]``."""
    heads = x.unflatten(-1, (max(outputs) + 1, -1)).unbind(-2)
    return torch.cat([heads[number] for number in outputs], -1)
