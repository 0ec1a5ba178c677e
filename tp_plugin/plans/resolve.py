"""From rules to a Plan: match modules, pair columns with their row, deal heads, and refuse what would be wrong.

Nothing is touched here. The model may be on ``meta``.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from torch import nn

from tp_plugin.errors import TensorParallelError
from tp_plugin.layout import ShardLayout
from tp_plugin.plans import plan as p
from tp_plugin.plans.experts import check_implementation, join_mixtures, place_experts
from tp_plugin.plans.heads import deal_heads
from tp_plugin.plans.latent import is_latent, place_latent, shared_key
from tp_plugin.plans.plan import Placement, Plan, RegionPlan, Rule
from tp_plugin.plans.registry import rules_for

Modules = Mapping[str, Any]  # full name -> module; typed loosely, as nn.Module types its attributes
QUERY = ("q_proj",)
KEY_VALUE = ("k_proj", "v_proj")


def plan_for(model: nn.Module, tp_size: int, own_rules: Mapping[str, str] | None = None) -> Plan:
    """The validated plan of ``model`` over ``tp_size`` ranks.

    Args:
        model: any module; a transformers model brings its own rules and its embedding and head.
        tp_size: ranks.
        own_rules: rules that go before every other source, module-name pattern -> style.

    Raises:
        TensorParallelError: in one sentence, what does not fit and what to change.
    """
    rules = rules_for(model, own_rules or {})
    modules = dict(model.named_modules())
    matched, unused = _match(rules, modules)
    matched |= _vocabulary(model, modules, matched)
    placements: dict[str, Placement] = {}
    regions: list[RegionPlan] = []
    for block, members in _by_block(matched).items():
        found, region = _place_block(block, members, modules, tp_size)
        placements |= found
        regions += [region] if region else []
    implementation = check_implementation(model)
    experts = [name for name, rule in matched.items() if rule.style == p.EXPERTS]
    for name in experts:
        placements[name] = place_experts(name, modules[name], matched[name], tp_size, implementation)
    placements = {name: placements[name] for name in modules if name in placements}
    if not any(placement.layouts for placement in placements.values()):
        raise TensorParallelError(
            f"nothing of {type(model).__name__} would be sharded: neither transformers nor tp-plugin has rules for it; "
            "give them in the 'plan' of the tp_plugin block or with tp_plugin.plans.register_family."
        )
    whole = _replicated(model, modules, placements)
    _check_tied(modules, placements)
    _check_forgotten(regions, placements, matched, whole)
    mixtures, regions = join_mixtures(experts, regions, matched, modules)
    return Plan(tp_size, placements, tuple(regions), tuple(whole), tuple(unused), tuple(mixtures))


def _match(rules: list[Rule], modules: Modules) -> tuple[dict[str, Rule], list[Rule]]:
    """First matching rule of every module; the rules that hit nothing."""
    matched: dict[str, Rule] = {}
    hit: set[Rule] = set()
    for name in modules:
        for rule in rules:
            if rule.matches(name):
                hit.add(rule)
                matched.setdefault(name, rule)
    idle = [rule for rule in rules if rule not in hit]
    for rule in idle:
        if rule.source != "HF plan" and not rule.optional:
            near = difflib.get_close_matches(rule.pattern, {p.fold(name) for name in modules}, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise TensorParallelError(f"the plan's rule {rule.pattern!r}: {rule.style} hits no module{hint}")
    return matched, idle


def _vocabulary(model: nn.Module, modules: Modules, matched: Mapping[str, Rule]) -> dict[str, Rule]:
    """The token embedding and the head are sharded over the vocabulary, whatever HF's plan says, unless you say."""
    found = {}
    for getter, style in (("get_input_embeddings", p.VOCAB_EMBEDDING), ("get_output_embeddings", p.VOCAB_HEAD)):
        try:
            module = getattr(model, getter)()
        except (AttributeError, NotImplementedError):
            continue
        for name, candidate in modules.items():
            if candidate is module and module is not None and getattr(matched.get(name), "source", "") != "yours":
                found[name] = Rule(name, style, "vocabulary")
    return found


def _by_block(matched: Mapping[str, Rule]) -> dict[str, dict[str, Rule]]:
    blocks: dict[str, dict[str, Rule]] = {}
    for name, rule in matched.items():
        blocks.setdefault(name.rpartition(".")[0], {})[name] = rule
    return blocks


def _place_block(
    block: str, members: Mapping[str, Rule], modules: Modules, tp: int
) -> tuple[dict[str, Placement], RegionPlan | None]:
    placed: dict[str, Placement] = {}
    columns = [name for name, rule in members.items() if rule.style == p.COLUMN]
    rows = [name for name, rule in members.items() if rule.style == p.ROW]
    for name, rule in members.items():
        if rule.style in (p.PARTIAL, p.ENTER):
            placed[name] = Placement(name, rule.style, rule.source)
        elif rule.style == p.LATENT:
            placed[name] = Placement(name, rule.style, rule.source, tail=shared_key(name, modules))
        elif rule.style in (p.VOCAB_EMBEDDING, p.VOCAB_HEAD, p.COLUMN_GATHER, p.ROW_SPLIT):
            placed[name] = _alone(name, rule, modules[name], tp)
    if not columns and not rows:
        return placed, None
    if len(rows) != 1 or not columns:
        have = f"column {', '.join(columns) or 'none'}; row {', '.join(rows) or 'none'}"
        raise TensorParallelError(
            f"block {block!r} needs at least one column and exactly one row, the plan gives it: {have}; "
            "complete the rules (or use column_gather and row_split, which stand alone)."
        )
    for name in (*columns, *rows):
        _require_linear(name, modules[name], members[name])
    leaves = {name.rpartition(".")[2] for name in columns}
    if is_latent(columns):
        found, ratio = place_latent(block, columns, rows[0], members, modules, tp), None
    elif leaves & set(QUERY) and leaves & set(KEY_VALUE):
        found, ratio = _place_attention(block, columns, rows[0], members, modules, tp)
    else:
        found, ratio = _place_mlp(columns, rows[0], members, modules, tp), None
    return placed | found, RegionPlan(block, tuple(columns), rows[0], ratio)


def _place_attention(
    block: str, columns: list[str], row: str, members: Mapping[str, Rule], modules: Modules, tp: int
) -> tuple[dict[str, Placement], int]:
    parent = modules[block]
    head_dim = getattr(parent, "head_dim", None)
    sizes = {name.rpartition(".")[2]: modules[name].out_features for name in columns}
    query = next(leaf for leaf in QUERY if leaf in sizes)
    kv_sizes = {sizes[leaf] for leaf in KEY_VALUE if leaf in sizes}
    strangers = set(sizes) - set(QUERY) - set(KEY_VALUE)
    if not head_dim or strangers or len(kv_sizes) != 1 or sizes[query] % head_dim or min(kv_sizes) % head_dim:
        raise TensorParallelError(
            f"{block}: cannot tell its heads from head_dim={head_dim} and output sizes {sizes}; its layout needs rules "
            "of its own, or column_gather and row_split."
        )
    dealt = deal_heads(sizes[query] // head_dim, kv_sizes.pop() // head_dim, tp, where=block)
    placed = {}
    for name in columns:
        is_query = name.rpartition(".")[2] in QUERY
        weight = modules[name].weight
        layout = ShardLayout.units(weight.shape, 0, head_dim, dealt.queries if is_query else dealt.kvs)
        repeats = None if is_query else dealt.repeats
        placed[name] = _column(name, members[name], modules[name], layout, repeats)
        if is_query:
            placed[row] = Placement(
                row, p.ROW, members[row].source, {"weight": layout.along(1, modules[row].weight.shape)}
            )
    return placed, dealt.ratio


def _place_mlp(
    columns: list[str], row: str, members: Mapping[str, Rule], modules: Modules, tp: int
) -> dict[str, Placement]:
    width = modules[row].in_features
    _require_width(row, width, tp)
    down = modules[row].weight
    placed = {row: Placement(row, p.ROW, members[row].source, {"weight": ShardLayout.even(down.shape, 1, tp)})}
    for name in columns:
        weight, blocks = modules[name].weight, len(members[name].blocks)
        if weight.shape[0] != width * blocks:
            raise TensorParallelError(
                f"column {name!r} gives {weight.shape[0]} features and row {row!r} takes {width}; they do not belong "
                "together, correct the rules."
            )
        parts = [ShardLayout.even((width,), 0, tp)] * blocks
        placed[name] = _column(name, members[name], modules[name], ShardLayout.packed(weight.shape, 0, parts))
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
        _require_super(name, module, nn.Embedding)
    else:
        _require_linear(name, module, rule)
    dim = 1 if rule.style == p.ROW_SPLIT else 0
    size = module.weight.shape[dim]
    _require_width(name, size, tp)
    layout = ShardLayout.even(module.weight.shape, dim, tp)
    if dim == 1:
        return Placement(name, rule.style, rule.source, {"weight": layout})
    return _column(name, rule, module, layout)


def _column(
    name: str, rule: Rule, module: Any, layout: ShardLayout, repeats: tuple[tuple[int, ...], ...] | None = None
) -> Placement:
    layouts = {"weight": layout}
    bias = getattr(module, "bias", None)
    if bias is not None:
        layouts["bias"] = layout.along(0, bias.shape)
    return Placement(name, rule.style, rule.source, layouts, repeats)


def _require_width(name: str, size: int, tp: int) -> None:
    if size < tp:
        raise TensorParallelError(
            f"{name!r} has {size} features to shard, fewer than the {tp} ranks; choose tensor_parallel.autotp_size "
            f"at most {size}."
        )


def _require_linear(name: str, module: nn.Module, rule: Rule) -> None:
    if not isinstance(module, nn.Linear):
        raise TensorParallelError(f"{name!r} is a {type(module).__name__}, style {rule.style} needs an nn.Linear.")
    _require_super(name, module, nn.Linear)


def _require_super(name: str, module: nn.Module, base: type[nn.Module]) -> None:
    """A forward of its own is kept only if it calls super().forward, behind which the sharded one is put."""
    forward = type(module).forward
    if forward is not base.forward and "__class__" not in forward.__code__.co_freevars:
        raise TensorParallelError(
            f"{name!r} is a {type(module).__name__} whose forward does not call super().forward, so it cannot be "
            "sharded (quantised layers and adapters are such); leave it out of the plan with the style 'replicated'."
        )


def _replicated(model: nn.Module, modules: Modules, placements: Mapping[str, Placement]) -> list[str]:
    sharded = {id(getattr(modules[name], leaf)) for name, pl in placements.items() for leaf in pl.layouts}
    return [name for name, param in model.named_parameters() if id(param) not in sharded]


def _check_tied(modules: Modules, placements: Mapping[str, Placement]) -> None:
    """Modules that share a parameter must agree on how it lies."""
    seen: dict[int, tuple[str, ShardLayout | None]] = {}
    for name, module in modules.items():
        for leaf, param in module.named_parameters(recurse=False):
            layout = placements[name].layouts.get(leaf) if name in placements else None
            other, known = seen.setdefault(id(param), (f"{name}.{leaf}", layout))
            if known != layout:
                raise TensorParallelError(
                    f"{other} and {name}.{leaf} are one tied parameter and would be sharded differently; "
                    "give both modules the same rule or untie them."
                )


def _check_forgotten(
    regions: list[RegionPlan], placements: Mapping[str, Placement], matched: Mapping[str, Rule], whole: list[str]
) -> None:
    """A module inside a sharded block, of which no rule speaks, may act on sharded tensors unnoticed."""
    for region in regions:
        for name in whole:
            owner = name.rpartition(".")[0]
            inside = owner == region.block or owner.startswith(f"{region.block}.") if region.block else "." not in owner
            if inside and owner not in placements and owner not in matched:
                raise TensorParallelError(
                    f"parameter {name!r} lies inside the sharded block {region.block!r} and no rule says what it acts "
                    "on; add a rule for its module: 'partial' if on sharded tensors, 'replicated' if not."
                )
