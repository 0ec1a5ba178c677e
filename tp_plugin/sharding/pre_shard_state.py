"""Changes that sharding made to each module, so that an unsharded view can undo them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

ATTRIBUTE = "tp_original"
MISSING = object()
"""Stands for an attribute that was not there."""


@contextlib.contextmanager
def remembering(model: nn.Module) -> Iterator[None]:
    """Note the class and attributes of every module that the ``with`` block changes; see :func:`original_of`.

    Parameters, buffers, children and hooks are not noted: parameter objects survive, hooks are no part of a view.
    """
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    yield
    for module, kind, attributes in before:
        now = vars(module)
        changed = {
            name: attributes.get(name, MISSING)
            for name in attributes.keys() | now.keys()
            if not _is_structure(name) and attributes.get(name, MISSING) is not now.get(name, MISSING)
        }
        if kind is not type(module) or changed:
            first_kind, first = now.get(ATTRIBUTE, (kind, {}))
            module.__dict__[ATTRIBUTE] = first_kind, changed | first


def original_of(module: nn.Module) -> tuple[type[nn.Module], dict[str, Any]]:
    """The module's class before sharding, and its present attributes with those that sharding changed put back."""
    kind, changed = vars(module).get(ATTRIBUTE, (type(module), {}))
    attributes = {name: value for name, value in vars(module).items() if name != ATTRIBUTE}
    for name, value in changed.items():
        attributes.pop(name, None)
        if value is not MISSING:
            attributes[name] = value
    return kind, attributes


def _is_structure(name: str) -> bool:
    return name in ("_parameters", "_buffers", "_modules", "training", ATTRIBUTE) or "_hooks" in name
