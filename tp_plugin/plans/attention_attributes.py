"""Attributes of an attention: the size of its heads, and the counts of them that its forward reads."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from tp_plugin.plans import plan as p

HEAD_DIM = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
"""Attributes of an attention module that give a head's size; the first that there is counts."""
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nheads", "heads", "h")
_WIDTHS = (
    "all_head_size",
    "inner_dim",
    "embed_dim",
    "hidden_size",
    "d_model",
    "dim",
    "width",
    "hidden_dim",
    "attn_dim",
)


def head_dim_of(parent: nn.Module, width: int) -> int:
    """Size of a head, from an attribute of the attention, or from its number of heads or its config's; 0 if unknown.

    Args:
        parent: the module that owns the projections.
        width: outputs of the query projection.
    """
    for name in (*HEAD_DIM, "d_head", "dim_head", "d_k", "d_kv"):
        if isinstance(found := getattr(parent, name, None), int) and found > 0:
            return found
    for owner in (parent, getattr(parent, "config", None)):
        for name in HEAD_COUNTS:
            if isinstance(count := getattr(owner, name, None), int) and count > 0 and width % count == 0:
                return width // count
    return 0


def local_attributes(parent: nn.Module, queries: int, kvs: int, head_dim: int) -> Iterator[tuple[str, str]]:
    """(attribute, quantity) of the attributes that the class's methods read and that count its heads or widths."""
    for name in dict.fromkeys(_attributes_read(type(parent))):
        value: Any = parent
        for part in name.split("."):
            value = getattr(value, part, None)
        leaf = name.rpartition(".")[2]
        if not isinstance(value, int) or isinstance(value, bool) or leaf in HEAD_DIM:
            continue
        is_kv = "kv" in leaf or "key_value" in leaf
        if "group" in leaf and value == queries // kvs:
            yield name, p.GROUPS
        elif is_kv and value == kvs:
            yield name, p.KV_HEADS
        elif (leaf in HEAD_COUNTS or "head" in leaf) and value == queries:
            yield name, p.QUERY_HEADS
        elif leaf in _WIDTHS and value == queries * head_dim:
            yield name, p.QUERY_WIDTH


def methods_of(kind: type) -> Iterator[str]:
    """Source of every method but ``__init__``, where it is available."""
    for owner in kind.__mro__:
        if owner in (nn.Module, object):
            return
        for name, method in vars(owner).items():
            if inspect.isfunction(method) and name != "__init__":
                with contextlib.suppress(OSError, TypeError):
                    yield inspect.getsource(method)


def _attributes_read(kind: type) -> list[str]:
    return [name for source in methods_of(kind) for name in re.findall(r"\bself\.((?:config\.)?\w+)", source)]
