"""Regions of a block: columns told apart by the row that closes them, and placed together with what follows them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from tp_plugin.errors import TensorParallelError
from tp_plugin.layout import ShardLayout
from tp_plugin.plans import checks
from tp_plugin.plans import plan as p
from tp_plugin.plans.attention import Attention, has_heads
from tp_plugin.plans.checks import in_features, out_features
from tp_plugin.plans.latent import LatentAttention, is_latent, shared_key
from tp_plugin.plans.match import Modules
from tp_plugin.plans.plan import Placement, RegionPlan, Rule

FOLLOWERS = (p.WIDE_NORM, p.EACH_HEAD, p.PER_HEAD)
"""Styles of what follows the heads of an attention."""


def by_region(matched: Mapping[str, Rule]) -> dict[tuple[str, str], dict[str, Rule]]:
    """(block, region) -> its members."""
    regions: dict[tuple[str, str], dict[str, Rule]] = {}
    for name, rule in matched.items():
        regions.setdefault((rule.block(name), rule.region), {})[name] = rule
    return regions


def pairs_of(members: Mapping[str, Rule], modules: Modules, patterns: Sequence[str]) -> list[dict[str, Rule]]:
    """The members of one block, grouped by region; one group where the block has a single region.

    A row closes the columns before it, in the model's order or else in that of the user's rules.

    Args:
        members: name -> rule of everything in the block that a rule matches.
        modules: of the model.
        patterns: of the user's rules, in order.
    """
    linears = [name for name, rule in members.items() if rule.style in (p.COLUMN, p.ROW)]
    if sum(members[name].style == p.ROW for name in linears) < 2:
        return [dict(members)]
    in_model = {name: index for index, name in enumerate(modules)}
    said = {pattern: index for index, pattern in enumerate(patterns)}
    by_rule = {name: (said.get(members[name].pattern, len(said)), in_model[name]) for name in linears}
    for order in (sorted(linears, key=in_model.__getitem__), sorted(linears, key=by_rule.__getitem__)):
        pairs = _closed_by_rows(order, members)
        if pairs and all(_fits(pair, modules) for pair in pairs):
            return _with_others(pairs, members, modules)
    return [dict(members)]


def _closed_by_rows(order: Iterable[str], members: Mapping[str, Rule]) -> list[dict[str, Rule]]:
    """Groups of columns and their row; empty where a row has no columns or columns have no row."""
    pairs: list[dict[str, Rule]] = []
    columns: dict[str, Rule] = {}
    for name in order:
        columns[name] = members[name]
        if members[name].style == p.ROW:
            if len(columns) == 1:
                return []
            pairs.append(columns)
            columns = {}
    return [] if columns else pairs


def _fits(pair: Mapping[str, Rule], modules: Modules) -> bool:
    *columns, row = pair
    if any(getattr(modules[name], "weight", None) is None for name in pair):
        return False
    if has_heads({name: pair[name] for name in columns}, modules):
        return True  # an attention checks its own sizes
    width = in_features(modules[row])
    return all(out_features(modules[name]) == width * pair[name].blocks for name in columns)


def _with_others(pairs: list[dict[str, Rule]], members: Mapping[str, Rule], modules: Modules) -> list[dict[str, Rule]]:
    """Add the block's other members to the attention, whose heads they may follow, or else to the first pair."""
    paired = {name for pair in pairs for name in pair}
    columns = ({name: rule for name, rule in pair.items() if rule.style == p.COLUMN} for pair in pairs)
    attention = next((index for index, those in enumerate(columns) if has_heads(those, modules)), 0)
    pairs[attention] |= {name: rule for name, rule in members.items() if name not in paired}
    return pairs


def place_region(
    block: str, members: Mapping[str, Rule], modules: Modules, tp: int, uneven: bool
) -> tuple[dict[str, Placement], RegionPlan | None]:
    placed: dict[str, Placement] = {}
    columns = {name: rule for name, rule in members.items() if rule.style == p.COLUMN}
    rows = {name: rule for name, rule in members.items() if rule.style == p.ROW}
    followers = {name: rule for name, rule in members.items() if rule.style in FOLLOWERS}
    for name, rule in members.items():
        if rule.style in (p.PARTIAL, p.ENTER, p.FIRST):
            placed[name] = Placement(name, rule.style, rule.source)
        elif rule.style == p.LATENT:
            placed[name] = Placement(name, rule.style, rule.source, tail=shared_key(name, modules))
        elif rule.style in (p.VOCAB_EMBEDDING, p.VOCAB_HEAD, p.COLUMN_GATHER, p.ROW_SPLIT):
            placed[name] = _alone(name, rule, modules[name], tp)
    if not columns and not rows and not followers:
        return placed, None
    if len(rows) != 1 or not columns:
        have = f"column {', '.join(columns) or 'none'}; row {', '.join(rows) or 'none'}"
        raise TensorParallelError(
            f"block {block!r} needs at least one column and exactly one row, the plan gives it: {have}; "
            "complete the rules (or use column_gather and row_split, which stand alone)."
        )
    for name in (*columns, *rows):
        checks.require_linear(name, modules[name], members[name])
    (row,) = rows
    if is_latent(columns) or has_heads(columns, modules):
        heads = (LatentAttention if is_latent(columns) else Attention)(block, columns, row, modules, tp, uneven=uneven)
        placed |= {name: heads.column(name, rule) for name, rule in columns.items()}
        placed[row] = heads.placed_row(rows[row])
        for name, rule in followers.items():
            placement = heads.follower(name, rule)
            known = placed.get(placement.name)  # one module may hold several per-head parameters
            layouts = {**(known.layouts if known else {}), **placement.layouts}
            placed[placement.name] = dataclasses.replace(placement, layouts=layouts)
        return placed, heads.region()
    if followers:
        raise TensorParallelError(
            f"{next(iter(followers))!r} follows the heads of an attention, and block {block!r} has no query and key "
            "columns; correct the rules."
        )
    return placed | _place_mlp(columns, row, rows[row], modules, tp), RegionPlan(block, tuple(columns), row)


def _place_mlp(
    columns: Mapping[str, Rule], row: str, row_rule: Rule, modules: Modules, tp: int
) -> dict[str, Placement]:
    width = checks.in_features(modules[row])
    checks.require_width(row, width, tp)
    down = modules[row].weight
    layout = ShardLayout.even(down.shape, 1 - checks.out_dim(modules[row]), tp)
    placed = {row: Placement(row, p.ROW, row_rule.source, {"weight": layout}, equivalent=row_rule.equivalent)}
    for name, rule in columns.items():
        size = checks.out_features(modules[name])
        if size != width * rule.blocks:
            raise TensorParallelError(
                f"column {name!r} gives {size} features and row {row!r} takes {width}; they do not belong "
                "together, correct the rules."
            )
        parts = [ShardLayout.even((width,), 0, tp)] * rule.blocks
        dim = checks.out_dim(modules[name])
        placed[name] = _column(name, rule, modules[name], ShardLayout.packed(modules[name].weight.shape, dim, parts))
    return placed


def _alone(name: str, rule: Rule, module: Any, tp: int) -> Placement:
    if rule.style == p.VOCAB_EMBEDDING:
        if not isinstance(module, nn.Embedding):
            raise TensorParallelError(f"{name!r} is a {type(module).__name__}, {rule.style} needs an nn.Embedding.")
        if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
            raise TensorParallelError(
                f"{name!r} uses max_norm, sparse or scale_grad_by_freq, which a sharded vocabulary does not support; "
                "switch it off."
            )
        checks.require_super(name, module, nn.Embedding)
        dim = 0
    else:
        checks.require_linear(name, module, rule)
        dim = 1 - checks.out_dim(module) if rule.style == p.ROW_SPLIT else checks.out_dim(module)
    if rule.style == p.VOCAB_HEAD and checks.is_conv1d(module):
        raise TensorParallelError(f"{name!r} is a Conv1D, {rule.style} needs an nn.Linear.")
    checks.require_width(name, module.weight.shape[dim], tp)
    layout = ShardLayout.even(module.weight.shape, dim, tp)
    if rule.style == p.ROW_SPLIT:
        return Placement(name, rule.style, rule.source, {"weight": layout}, equivalent=rule.equivalent)
    return _column(name, rule, module, layout)


def _column(name: str, rule: Rule, module: Any, layout: ShardLayout) -> Placement:
    layouts = {"weight": layout}
    bias = getattr(module, "bias", None)
    if bias is not None:
        layouts["bias"] = layout.along(0, bias.shape)
    return Placement(name, rule.style, rule.source, layouts, equivalent=rule.equivalent)
