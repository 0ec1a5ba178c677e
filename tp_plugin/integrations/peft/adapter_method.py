"""AdapterMethod: the base class of adapter methods, ours (methods.py) and those that a user registers.

Imports nothing of PEFT, so that it can be exported without PEFT.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from tp_plugin.errors import TensorParallelError
from tp_plugin.layers import sum_partial_gradient
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh
from tp_plugin.plans import Placement
from tp_plugin.plans import plan as p
from tp_plugin.sharding.adapters import attach_layout, shard_param_

REPLICATED = (None, p.REPLICATED)
"""Styles of modules that are full on every rank; None for a module that the plan does not name."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A module with adapters, as the plan has it before anything is sharded.

    Attributes:
        name: of the module.
        tuner: PEFT's layer around it.
        placement: of the module; None if the plan does not name it.
        summed: the module's partial result is summed by its mixture of experts.
    """

    name: str
    tuner: Any
    placement: Placement | None
    summed: bool

    @property
    def style(self) -> str | None:
        return None if self.placement is None else self.placement.style

    @property
    def repeats_heads(self) -> bool:
        """Tell if a rank has key/value heads more than once."""
        return self.placement is not None and self.placement.outputs is not None


@dataclasses.dataclass(frozen=True)
class Site:
    """One adapter to be sharded.

    Attributes:
        tuner: PEFT's layer.
        adapter: name of the adapter in it.
        base: the module that it adapts, sharded by now.
        mesh: its groups.
    """

    tuner: Any
    adapter: str
    base: Any
    mesh: ParallelMesh

    @property
    def layout(self) -> ShardLayout | None:
        """Layout of the base's weight; None where the base is full on every rank."""
        return getattr(self.base, "tp_layout", None)

    def shard(self, param: Any, dim: int, layout: ShardLayout | None = None) -> None:
        """Keep this rank's shard of a full parameter: ``layout`` (default: the base's), along ``dim`` of ``param``."""
        found = (layout or self.base.tp_layout).along(dim, param.shape)
        shard_param_(param, found, self.mesh)
        attach_layout(param, found, self.mesh)

    def shard_linear(self, linear: nn.Linear, dim: int, layout: ShardLayout | None = None) -> ShardLayout:
        """:meth:`shard` the weight, and the bias where outputs (``dim`` 0) are sharded. Returns the weight's layout."""
        found = (layout or self.base.tp_layout).along(dim, linear.weight.shape)
        self.shard(linear.weight, dim, layout)
        if dim == 0 and linear.bias is not None:
            self.shard(linear.bias, 0, layout)
        return found

    def sum_gradient(self, param: nn.Parameter) -> None:
        """Sum the gradient of a replicated parameter over the TP group."""
        sum_partial_gradient(param, self.mesh)


class AdapterMethod:
    """Sharding of one class of PEFT's layers; an instance of it is in :data:`METHODS`.

    Attributes:
        layer: for :func:`register_adapter`, the class of PEFT's layers. A subclass of it is another layer.
        peft_type: for :func:`register_adapter`, the name of the PEFT type whose configs make such layers, as "LOHA".
        styles: styles of the modules that such a layer may adapt; None for a module that the plan does not name.
        after_sharding: PEFT makes such layers of full size around a sharded module, from its ``in_features`` and
            ``out_features``. Otherwise adapters of that type are refused in a sharded model.
    """

    layer: type[nn.Module] | None = None
    peft_type: str = ""
    after_sharding: bool = False
    styles: tuple[str | None, ...] = REPLICATED

    def parameters(self, tuner: Any) -> dict[str, nn.Parameter]:
        """Return the first parameter of each adapter by the adapter's name; it carries the mark of a sharded one."""
        raise NotImplementedError

    def unsupported(self, target: Target, adapter: str) -> str | None:
        """Return an error if this adapter cannot be sharded under the plan, although the style is supported."""
        return None

    def shard(self, site: Site) -> None:
        """Shard one adapter, whose parameters are full. Called once for each, on every rank, sharded base or not."""
        raise NotImplementedError


METHODS: dict[type, AdapterMethod] = {}
"""Method for each class of PEFT's layers; a subclass is not sharded like its base."""


def register_adapter(method: type[AdapterMethod]) -> type[AdapterMethod]:
    """Let models with adapters of this method be sharded; a class decorator.

    Args:
        method: a class with ``layer``, ``peft_type``, ``styles``, ``parameters`` and ``shard``.

    Raises:
        TensorParallelError: ``layer`` or ``peft_type`` is missing, or a style is unknown.
    """
    layer, unknown = method.layer, [style for style in method.styles if style not in (None, *p.STYLES)]
    if not isinstance(layer, type) or not method.peft_type:
        raise TensorParallelError(
            f"the adapter method {method.__name__} needs 'layer', a class of PEFT's layers, and 'peft_type', the name "
            f"of their PEFT type; it has {layer!r} and {method.peft_type!r}."
        )
    if unknown:
        raise TensorParallelError(
            f"the adapter method {method.__name__} names an unknown style {unknown[0]!r}; choose from "
            f"{', '.join(p.STYLES)}."
        )
    METHODS[layer] = method()
    return method


def method_of_type(peft_type: str | None) -> AdapterMethod | None:
    """The registered method for a PEFT type."""
    return next((method for method in METHODS.values() if method.peft_type == peft_type), None)
