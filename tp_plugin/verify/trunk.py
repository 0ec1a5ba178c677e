"""The part of a model that every forward of it passes, whoever calls it."""

from __future__ import annotations

import math

from torch import nn

from tp_plugin.weights.stream import full_shape


def trunk_of(model: nn.Module) -> nn.Module:
    """The model without its head and without wrappers: the innermost module around all of its layers that has more than
    half of the parameters of what it is in; the same on every rank. ``model`` itself where no child has so many."""
    while True:
        sizes = {child: sum(math.prod(full_shape(param)) for param in child.parameters()) for child in model.children()}
        largest = max(sizes, key=sizes.__getitem__, default=model)
        whole = not isinstance(largest, nn.ModuleList | nn.ModuleDict | nn.Sequential) and any(largest.children())
        if not whole or sizes.get(largest, 0) * 2 <= sum(sizes.values()):
            return model
        model = largest
