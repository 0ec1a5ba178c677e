"""Multi-head latent attention (DeepSeek-V2, 2024): heads are expanded from low-rank latents that every rank computes.

Queries come from ``q_proj`` or, by way of a latent, from ``q_b_proj``; ``kv_b_proj`` expands the other latent to a key
and a value for each head, and a part of the key that all heads share goes past it. Heads are dealt to ranks; the latents,
their norms and the key-value cache, which holds latents, stay replicated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tp_plugin.errors import TensorParallelError
from tp_plugin.layout import ShardLayout
from tp_plugin.plans.heads import deal_heads
from tp_plugin.plans.plan import COLUMN, ROW, Placement, Rule

EXPAND = "kv_b_proj"
_QUERIES = ("q_b_proj", "q_proj")


def is_latent(columns: list[str]) -> bool:
    """Whether these columns of a block belong to a latent attention."""
    return any(name.endswith(f".{EXPAND}") for name in columns)


def place_latent(
    block: str, columns: list[str], row: str, members: Mapping[str, Rule], modules: Mapping[str, Any], tp: int
) -> dict[str, Placement]:
    """Placements of the columns and the row of the latent attention ``block``, by whole heads.

    Raises:
        TensorParallelError: heads that cannot be told or dealt, or a column that is no part of a latent attention.
    """
    attention = modules[block]
    sizes = {
        **dict.fromkeys(_QUERIES, getattr(attention, "qk_head_dim", 0)),
        EXPAND: getattr(attention, "qk_nope_head_dim", 0) + getattr(attention, "v_head_dim", 0),
    }
    value = getattr(attention, "v_head_dim", 0)
    heads = modules[row].in_features // value if value else 0
    for name in columns:
        size = sizes.get(name.rpartition(".")[2], 0)
        if not heads or not size or modules[name].out_features != heads * size:
            raise TensorParallelError(
                f"{block}: cannot tell the heads of {name!r}, which gives {modules[name].out_features} features; its "
                "layout needs rules of its own, or column_gather and row_split."
            )
    dealt = deal_heads(heads, heads, tp, where=block)
    placed = {}
    for name in columns:
        weight, bias = modules[name].weight, modules[name].bias
        layout = ShardLayout.units(weight.shape, 0, sizes[name.rpartition(".")[2]], dealt.queries)
        layouts = {"weight": layout} if bias is None else {"weight": layout, "bias": layout.along(0, bias.shape)}
        placed[name] = Placement(name, COLUMN, members[name].source, layouts)
    layout = ShardLayout.units(modules[row].weight.shape, 1, value, dealt.queries)
    placed[row] = Placement(row, ROW, members[row].source, {"weight": layout})
    return placed


def shared_key(name: str, modules: Mapping[str, Any]) -> int:
    """How many of the last outputs of the latent projection ``name`` are the key that all heads share.

    Raises:
        TensorParallelError: its parent does not say.
    """
    size = getattr(modules.get(name.rpartition(".")[0]), "qk_rope_head_dim", None)
    if not isinstance(size, int) or not 0 < size < modules[name].out_features:
        raise TensorParallelError(
            f"{name!r}: its block has no qk_rope_head_dim that says which outputs go past {EXPAND}; use other styles."
        )
    return size
