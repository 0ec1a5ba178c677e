"""From rules to a Plan: match modules, pair columns with their row, deal heads, and refuse what would be wrong.

Nothing is touched here. The model may be on ``meta``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tp_plugin.errors import TensorParallelError
from tp_plugin.layout import ShardLayout
from tp_plugin.plans import checks
from tp_plugin.plans import plan as p
from tp_plugin.plans.attention import Attention, is_attention
from tp_plugin.plans.experts import check_implementation, join_mixtures, place_experts
from tp_plugin.plans.infer import infer
from tp_plugin.plans.latent import LatentAttention, is_latent, shared_key
from tp_plugin.plans.match import Modules, by_region, match, vocabulary
from tp_plugin.plans.plan import MixturePlan, Placement, Plan, RegionPlan, Rule
from tp_plugin.plans.registry import describes, rules_for

FOLLOWERS = (p.WIDE_NORM, p.EACH_HEAD, p.PER_HEAD)
"""Styles of what follows the heads of an attention."""


def plan_for(
    model: nn.Module, tp_size: int, own_rules: Mapping[str, str] | None = None, *, inferring: bool = True
) -> Plan:
    """The validated plan of ``model`` over ``tp_size`` ranks.

    Args:
        model: any module; a transformers model brings its own rules and its embedding and head.
        tp_size: ranks.
        own_rules: rules that go before every other source, module-name pattern -> style.
        inferring: read rules off the modules and shapes of blocks that no other source speaks of.

    Raises:
        TensorParallelError: in one sentence, what does not fit and what to change.
    """
    rules = rules_for(model, own_rules or {})
    modules = dict(model.named_modules())
    matched, unused = match(rules, modules)
    if inferring and not describes(model):
        inferred = infer(modules, {name for name, rule in matched.items() if name in modules})
        matched |= {name: rule for name, rule in match(inferred, modules)[0].items() if name not in matched}
    matched |= vocabulary(model, modules, matched)
    placements: dict[str, Placement] = {}
    regions: list[RegionPlan] = []
    for (block, _), members in by_region(matched).items():
        found, region = _place_region(block, members, modules, tp_size)
        placements |= found
        regions += [region] if region else []
    experts = [name for name, rule in matched.items() if rule.style == p.EXPERTS]
    implementation = check_implementation(model) if experts else None
    for name in experts:
        placements[name] = place_experts(name, modules[name], matched[name], tp_size, implementation)
    placements = {name: placements[name] for name in modules if name in placements}
    if not any(placement.layouts for placement in placements.values()):
        raise TensorParallelError(
            f"nothing of {type(model).__name__} would be sharded: neither transformers nor tp-plugin has rules for it; "
            "give them in the 'plan' of the tp_plugin block or with tp_plugin.plans.register_family."
        )
    whole = _replicated(model, modules, placements, matched)
    checks.require_tied_alike(modules, placements, matched)
    checks.require_nothing_forgotten(regions, placements, matched, whole)
    blocks = {region.block for region in regions} | {name.rpartition(".")[0] for name in experts}
    checks.require_sums_kept(rules, matched, modules, blocks)
    mixtures, regions = join_mixtures(experts, regions, matched, modules)
    placements = _without_idle_sums(placements, mixtures, regions)
    return Plan(tp_size, placements, tuple(regions), whole, tuple(unused), tuple(mixtures))


def _without_idle_sums(
    placements: Mapping[str, Placement], mixtures: Sequence[MixturePlan], regions: Sequence[RegionPlan]
) -> dict[str, Placement]:
    """Sums over the ranks only where something is partial: what lies in a block you keep whole has whole gradients.

    Style ``enter`` counts in blocks that sum at their end, ``first`` in sharded experts, ``latent`` and ``partial`` in
    regions, ``partial`` also beside regions that are given something for each head (MPNet's position bias is made once,
    by the encoder); a ``partial`` of yours counts wherever you put it.
    """
    blocks = {region.block for region in regions}
    given = {region.block for region in regions if region.inputs}
    experts = {mixture.experts for mixture in mixtures}
    summed = {mixture.block for mixture in mixtures if mixture.summed}

    def counts(placement: Placement) -> bool:
        if placement.style == p.ENTER:
            return placement.name.rpartition(".")[0] in summed
        if placement.style == p.FIRST:
            return placement.name.rpartition(".")[0] in experts
        if placement.style == p.LATENT or (placement.style == p.PARTIAL and placement.source != "yours"):
            parent = placement.name.rpartition(".")[0]
            beside = placement.style == p.PARTIAL and any(not parent or b.startswith(f"{parent}.") for b in given)
            return beside or any(not block or placement.name.startswith(f"{block}.") for block in blocks)
        return True

    return {name: placement for name, placement in placements.items() if counts(placement)}


def _place_region(
    block: str, members: Mapping[str, Rule], modules: Modules, tp: int
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
    if is_latent(columns) or is_attention(columns):
        heads = (LatentAttention if is_latent(columns) else Attention)(block, columns, row, modules, tp)
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


def _replicated(
    model: nn.Module, modules: Modules, placements: Mapping[str, Placement], matched: Mapping[str, Rule]
) -> dict[str, str]:
    """Parameters that stay whole, and why."""
    sharded = {id(getattr(modules[name], leaf)) for name, pl in placements.items() for leaf in pl.layouts}
    found = {}
    for name, param in model.named_parameters():
        if id(param) not in sharded:
            rule = matched.get(name) or matched.get(name.rpartition(".")[0])
            found[name] = _WHY.get(rule.style, p.ADDED_ONCE) if rule else p.NO_RULE
            if rule and rule.style == p.REPLICATED:
                found[name] = f"whole by a rule ({rule.source})"
    return found


_WHY = {
    p.PARTIAL: "acts on every rank's shards",
    p.ENTER: "its output goes to every rank's shards",
    p.LATENT: "its output goes to every rank's heads",
    p.SUM: p.NO_RULE,
    p.FIRST: p.NO_RULE,
}
"""Why a parameter of a module of this style is whole; of all others it is a bias, added once."""
