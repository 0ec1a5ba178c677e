"""What a model hands out where no gradient is recorded: computed logits, made by all ranks together."""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import MutableMapping
from typing import Any

from tp_plugin.lazy.logits import VocabParallelLogits


def materialise_outputs(output: Any) -> Any:
    """``output`` with every lazy logits in it computed, for a model's forward hook under ``no_grad``.

    Without it, ``if rank == 0: output.logits.argmax(-1)`` would start a collective that the other ranks never join.
    A collective call if there are lazy logits.

    Args:
        output: a tensor, tuple, named tuple, list, mapping, dataclass or HuggingFace ``ModelOutput``, nested at will.

    Returns:
        ``output`` itself if it holds no lazy logits; else a copy of the same type, keys and attributes alike.
    """
    if isinstance(output, VocabParallelLogits):
        return output.materialize()
    if isinstance(output, tuple | list):
        items = [materialise_outputs(item) for item in output]
        if all(new is old for new, old in zip(items, output, strict=True)):
            return output
        return output._make(items) if hasattr(output, "_make") else type(output)(items)
    if isinstance(output, MutableMapping):  # ModelOutput too: setting its key sets its attribute
        changed = {key: new for key, old in output.items() if (new := materialise_outputs(old)) is not old}
        if not changed:
            return output
        made = copy.copy(output)
        for key, value in changed.items():
            made[key] = value
        return made
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        fields = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
        changed = {name: new for name, old in fields.items() if (new := materialise_outputs(old)) is not old}
        if not changed:
            return output
        made = copy.copy(typing.cast(Any, output))
        for name, value in changed.items():
            object.__setattr__(made, name, value)  # frozen ones too
        return made
    return output
