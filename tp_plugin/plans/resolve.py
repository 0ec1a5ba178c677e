"""Resolve rules to a Plan: match modules, pair columns with their row, deal heads, and refuse wrong plans.

Nothing is touched here. The model may be on ``meta``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import nn

from tp_plugin.config import PlanRules, TensorParallelConfig
from tp_plugin.errors import TensorParallelError
from tp_plugin.plans import checks
from tp_plugin.plans import plan as p
from tp_plugin.plans.attention import has_heads
from tp_plugin.plans.checks import computes_linear
from tp_plugin.plans.experts import check_implementation, join_mixtures, place_experts
from tp_plugin.plans.infer import infer
from tp_plugin.plans.latent import is_latent
from tp_plugin.plans.match import Modules, match, vocabulary
from tp_plugin.plans.plan import MixturePlan, Placement, Plan, RegionPlan, Rule
from tp_plugin.plans.regions import by_region, pairs_of, place_region
from tp_plugin.plans.registry import describes, rules_for
from tp_plugin.plans.suggest import line_for


def plan_for(
    model: nn.Module,
    tp_size: int,
    own_rules: PlanRules | None = None,
    *,
    inferring: bool = True,
    uneven_heads: bool = False,
) -> Plan:
    """The validated plan of ``model`` over ``tp_size`` ranks.

    Args:
        model: any module; a transformers model brings its own rules and its embedding and head.
        tp_size: ranks.
        own_rules: the user's rules, which go before every other source.
        inferring: infer rules of blocks that no other rule matches.
        uneven_heads: let ranks differ by one query head where heads cannot be dealt evenly.

    Raises:
        TensorParallelError: in one sentence, the mismatch and its fix.
    """
    modules = dict(model.named_modules())
    rules, matched, unused = matched_rules(model, modules, own_rules, inferring=inferring)
    matched = _replaceable(matched, modules)
    placements: dict[str, Placement] = {}
    regions: list[RegionPlan] = []
    for (block, _), members in by_region(matched).items():
        for pair in pairs_of(members, modules, list(own_rules or {})):
            found, region = place_region(block, pair, modules, tp_size, uneven_heads)
            placements |= found
            regions += [region] if region else []
    experts = [name for name, rule in matched.items() if rule.style == p.EXPERTS]
    implementation = check_implementation(model) if experts else None
    for name in experts:
        placements[name] = place_experts(name, modules[name], matched[name], tp_size, implementation)
    placements = {name: placements[name] for name in modules if name in placements}
    if not any(placement.layouts for placement in placements.values()):
        line = line_for(modules, tp_size)
        raise TensorParallelError(
            f"nothing of {type(model).__name__} would be sharded: neither transformers nor tp-plugin has rules for it; "
            f"give them in the 'plan' of the tp_plugin block{f', such as {line},' if line else ''} or with "
            "tp_plugin.plans.register_family."
        )
    whole = _replicated(model, modules, placements, matched)
    checks.require_tied_alike(modules, placements, matched)
    plain = _plain_blocks(regions, matched, modules)
    checks.require_nothing_forgotten(regions, placements, matched, whole, modules, plain)
    blocks = {region.block for region in regions} | {name.rpartition(".")[0] for name in experts}
    checks.require_sums_kept(rules, matched, modules, blocks)
    mixtures, regions = join_mixtures(experts, regions, matched, modules)
    placements = _without_idle_sums(placements, mixtures, regions)
    return Plan(tp_size, placements, tuple(regions), whole, tuple(unused), tuple(mixtures))


def matched_rules(
    model: nn.Module, modules: Modules, own_rules: PlanRules | None = None, *, inferring: bool = True
) -> tuple[list[Rule], dict[str, Rule], list[Rule]]:
    """All rules; the one that counts for each module or parameter, by name; HF's rules that match nothing."""
    rules = rules_for(model, own_rules or {})
    matched, unused = match(rules, modules)
    if inferring and not describes(model):
        inferred = infer(modules, {name for name, rule in matched.items() if name in modules})
        matched |= {name: rule for name, rule in match(inferred, modules)[0].items() if name not in matched}
    return rules, matched | vocabulary(model, modules, matched), unused


def plan_as(model: nn.Module, config: TensorParallelConfig, *, inferring: bool | None = None) -> Plan:
    """:func:`plan_for` with the options of ``config``; ``inferring``: None does as its 'infer' says."""
    inferring = config.infer != "off" if inferring is None else inferring
    return plan_for(model, config.tp_size, config.plan, inferring=inferring, uneven_heads=config.uneven_heads)


def _plain_blocks(regions: Sequence[RegionPlan], matched: Mapping[str, Rule], modules: Modules) -> set[str]:
    """Blocks without heads whose regions have the user's rules alone."""
    others = {
        region.block
        for region in regions
        if any(matched[name].source != p.YOURS for name in (*region.columns, region.row))
        or is_latent(region.columns)
        or has_heads({name: matched[name] for name in region.columns}, modules)
    }
    return {region.block for region in regions} - others


def _replaceable(matched: Mapping[str, Rule], modules: Modules) -> dict[str, Rule]:
    """``matched``, with rules marked ``equivalent`` where a module of another class computes a linear layer."""
    linear = (p.COLUMN, p.ROW, p.COLUMN_GATHER, p.ROW_SPLIT)
    return {
        name: dataclasses.replace(rule, equivalent=True)
        if rule.style in linear and not rule.equivalent and not checks.is_linear(modules[name])
        and computes_linear(modules[name])
        else rule
        for name, rule in matched.items()
    }  # fmt: skip


def _without_idle_sums(
    placements: Mapping[str, Placement], mixtures: Sequence[MixturePlan], regions: Sequence[RegionPlan]
) -> dict[str, Placement]:
    """``placements`` without sums over the ranks where nothing is partial: a replicated block has full gradients.

    Style ``enter`` counts in blocks that sum at their end, ``first`` in sharded experts, ``latent`` and ``partial`` in
    regions. A ``partial`` also counts beside regions with an argument for each head: MPNet's encoder makes its position
    bias once. A ``partial`` of the user's always counts.
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
        if placement.style == p.LATENT or (placement.style == p.PARTIAL and placement.source != p.YOURS):
            parent = placement.name.rpartition(".")[0]
            beside = placement.style == p.PARTIAL and any(not parent or b.startswith(f"{parent}.") for b in given)
            return beside or any(not block or placement.name.startswith(f"{block}.") for block in blocks)
        return True

    return {name: placement for name, placement in placements.items() if counts(placement)}


def _replicated(
    model: nn.Module, modules: Modules, placements: Mapping[str, Placement], matched: Mapping[str, Rule]
) -> dict[str, str]:
    """Parameters that are replicated, and why."""
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
"""Reasons by style why a parameter is replicated; of other styles it is a bias, added once."""
