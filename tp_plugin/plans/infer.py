"""Rules inferred from modules and their shapes, for blocks that no other rule matches.

Two patterns are recognised: query, key and value projections by name with their output projection, and one or two
linear layers that widen followed by one that narrows again. A block with anything else on its inner width (a
convolution, a bare parameter, an unknown norm) stays replicated, which is always right. Shapes do not tell what a
forward computes, so a plan with inferred rules is tried on a small copy (:mod:`tp_plugin.step_guard.trial`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from tp_plugin.plans import plan as p
from tp_plugin.plans.attention import ROLES
from tp_plugin.plans.attention_attributes import head_dim_of, local_attributes, methods_of
from tp_plugin.plans.checks import in_features, is_linear, out_features
from tp_plugin.plans.match import Modules
from tp_plugin.plans.plan import Rule, fold

SOURCE = p.INFERRED
_ROLES = {
    **ROLES,
    **dict.fromkeys(("query_proj", "q_linear", "linear_q", "project_q", "to_q", "Wq", "query_linear"), "query"),
    **dict.fromkeys(("key_proj", "k_linear", "linear_k", "project_k", "to_k", "Wk", "key_linear"), "key"),
    **dict.fromkeys(("value_proj", "v_linear", "linear_v", "project_v", "to_v", "Wv", "value_linear"), "value"),
}


def infer(modules: Modules, spoken: Collection[str]) -> list[Rule]:
    """Infer rules for the blocks that no other rule matches.

    Args:
        modules: full name -> module of the full model, which may be on ``meta``.
        spoken: modules that have a rule already; layers with one of them are left alone.

    Returns:
        Rules with source "inferred"; patterns are folded over layer numbers. Layers that would need different rules
        under one pattern get none.
    """
    taken = {_layer(name) for name in spoken}
    twice = _reached_twice(modules)
    found: dict[str, Rule] = {}
    clashing: set[str] = set()
    claimed: set[str] = set()
    for find in (_attention, _mlp):
        for block in sorted(modules, key=lambda name: -name.count(".")):
            if _layer(block) in taken or not block or twice & _near(modules[block]):
                continue
            for rules in find(block, modules, claimed):
                claimed |= rules.keys()
                for rule in rules.values():
                    known = found.setdefault(rule.pattern, rule)
                    clashing |= {rule.pattern} if known != rule else set()
    of_all = {fold(name) for name in modules if name not in claimed and _layer(name) not in taken}
    clashing |= of_all & found.keys()  # one pattern matches all layers or none
    blocks = {_block_pattern(found[pattern]) for pattern in clashing}
    return [rule for rule in found.values() if _block_pattern(rule) not in blocks]


def _layer(name: str) -> str:
    """The nearest numbered module above ``name``, or its topmost parent."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=0)
    return ".".join(parts[: last + 1])


def _reached_twice(modules: Modules) -> set[int]:
    """Linear layers with several names: a layer that another module also computes with is no part of a plain block."""
    seen: set[int] = set()
    root = modules.get("")
    names = () if root is None else root.named_modules(remove_duplicate=False)
    return {id(m) for _, m in names if is_linear(m) and (id(m) in seen or seen.add(id(m)))}  # type: ignore[func-returns-value]


def _near(block: nn.Module) -> set[int]:
    """The modules of ``block`` that rules are looked for: its children and theirs."""
    return {id(m) for child in block.children() for m in (child, *child.children())}


def _block_pattern(rule: Rule) -> str:
    return ".".join(rule.pattern.split(".")[: -rule.up])


def _attention(block: str, modules: Modules, claimed: set[str]) -> Iterator[dict[str, Rule]]:
    """``block`` owns the query, key and value projections; the output projection is beside them or in a sibling."""
    columns = {_ROLES[leaf]: f"{block}.{leaf}" for leaf, child in _linears(modules[block]) if leaf in _ROLES}
    if set(columns) != {"query", "key", "value"} or claimed.intersection(columns.values()):
        return
    parent = modules[block]
    query, key, value = (modules[columns[role]] for role in ("query", "key", "value"))
    width, kv_width = out_features(query), out_features(key)
    head_dim = head_dim_of(parent, width)
    if (
        _reads_whole_width(parent)
        or not head_dim
        or width % head_dim
        or kv_width % head_dim
        or width % kv_width
        or out_features(value) != kv_width
    ):
        return
    row, up = _output_of(block, modules, set(columns.values()), width, in_features(query))
    if not row:
        return
    queries, kvs = width // head_dim, kv_width // head_dim
    local = tuple(local_attributes(parent, queries, kvs, head_dim))
    rules = {
        name: Rule(fold(name), p.COLUMN, SOURCE, role=role, up=up, region=SOURCE, head_dim=head_dim, local=local)
        for role, name in columns.items()
    }
    rules[row] = Rule(fold(row), p.ROW, SOURCE, up=up, region=SOURCE)
    rest = _rest(".".join(row.split(".")[:-up]), modules, rules, {width, kv_width}, {head_dim: p.PARTIAL}, claimed)
    if rest is not None:
        yield rules | rest


def _output_of(block: str, modules: Modules, columns: set[str], width: int, hidden: int) -> tuple[str, int]:
    """The linear layer from the heads' ``width`` back to ``hidden``, and how many parts above it the block is."""
    beside = [f"{block}.{leaf}" for leaf, m in _linears(modules[block]) if f"{block}.{leaf}" not in columns]
    fits = [n for n in beside if in_features(modules[n]) == width and out_features(modules[n]) == hidden]
    if len(fits) == len(beside) == 1:
        return fits[0], 1
    above = block.rpartition(".")[0]
    if beside or not above:
        return "", 0
    near = [
        f"{above}.{child}.{leaf}"
        for child, sibling in modules[above].named_children()
        for leaf, _ in _linears(sibling)
        if f"{above}.{child}" != block
    ]
    fits = [n for n in near if in_features(modules[n]) == width and out_features(modules[n]) == hidden]
    return (fits[0], 2) if len(fits) == len(near) == 1 else ("", 0)


def _mlp(block: str, modules: Modules, claimed: set[str]) -> Iterator[dict[str, Rule]]:
    """Linears of ``block`` or of its children: one or two from H to I, or one from H to 2I, and one from I to H."""
    own = [f"{block}.{leaf}" for leaf, _ in _linears(modules[block])]
    below = [
        f"{block}.{child}.{leaf}" for child, module in modules[block].named_children() for leaf, _ in _linears(module)
    ]
    for up, names in ((1, own), (2, below)):
        names = [name for name in names if name not in claimed]
        pairs = [(row, found) for row in names if (found := _columns_of(row, names, modules))]
        if len(pairs) != 1:
            continue
        row, columns = pairs[0]
        inner, hidden = in_features(modules[row]), out_features(modules[row])
        rules = {
            name: Rule(fold(name), p.COLUMN, SOURCE, up=up, region=SOURCE, blocks=out_features(modules[name]) // inner)
            for name in columns
        }
        rules[row] = Rule(fold(row), p.ROW, SOURCE, up=up, region=SOURCE)
        rest = _rest(
            block, modules, rules, {inner, *(out_features(modules[n]) for n in columns)} - {hidden}, {}, claimed
        )
        if rest is not None:
            yield rules | rest
            return


def _columns_of(row: str, names: list[str], modules: Modules) -> list[str]:
    inner, hidden = in_features(modules[row]), out_features(modules[row])
    if inner <= hidden:  # one that narrows is told from one that widens by that alone
        return []
    others = [n for n in names if n != row and inner in (in_features(modules[n]), out_features(modules[n]))]
    plain = [n for n in names if n != row and _shape(modules[n]) == (hidden, inner)]
    before = names[: names.index(row)]
    packed = [n for n in names if n != row and _shape(modules[n]) == (hidden, 2 * inner)]
    if 1 <= len(plain) <= 2 and not packed and len(others) == len(plain):
        return plain if set(plain) & set(before) else []  # one that narrows first is a bottleneck
    return packed if len(packed) == 1 and not others and packed[0] in before else []


def _rest(
    block: str,
    modules: Modules,
    rules: dict[str, Rule],
    inner: set[int],
    known: dict[int, str],
    claimed: set[str],
) -> dict[str, Rule] | None:
    """Rules for the other modules with parameters in ``block``; None if one of them may act on the sharded width."""
    found: dict[str, Rule] = {}
    for name, module in modules.items():
        if not (name == block or name.startswith(f"{block}.")) or name in rules or name in claimed:
            continue
        own = list(module.named_parameters(recurse=False))
        if any(name.startswith(f"{other}.") for other in rules):
            return None  # a projection that is itself made of modules (an adapter)
        if not own:
            continue
        norm = "norm" in type(module).__name__.lower()
        sizes = {size for _, param in own for size in param.shape}
        if norm and len(sizes) == 1 and (size := sizes.pop()) not in inner:
            style = known.get(size, p.REPLICATED) if name.rpartition(".")[0] in _parents(rules) else p.REPLICATED
        elif norm and known and _is_outer(name.rpartition(".")[2], _beside(name, rules)):
            style = p.REPLICATED  # as wide as the block's input, and by its name not a projection's
        elif not known and len(sizes) and not sizes & (inner | {1}) and not _beside(name, rules):
            style = p.REPLICATED  # an attention beside an MLP
        elif isinstance(module, nn.Linear) and not set(_shape(module)) & inner and _beside(name, rules):
            style = p.REPLICATED  # a router or a gate of the block's input
        else:
            return None
        found[name] = Rule(fold(name), style, SOURCE, optional=True)
    return found


def _is_outer(leaf: str, beside: bool) -> bool:
    inside = re.search(r"(^|_)[qkv]_|sub|inner|mid", leaf)
    return not inside and (
        not beside or re.fullmatch(r"(layer_?)?norm|ln|LayerNorm|(out|output)_layer_?norm", leaf) is not None
    )


def _beside(name: str, rules: dict[str, Rule]) -> bool:
    return name.rpartition(".")[0] in _parents({n: r for n, r in rules.items() if r.style == p.COLUMN})


def _parents(rules: dict[str, Rule]) -> set[str]:
    return {name.rpartition(".")[0] for name in rules}


def _linears(module: nn.Module) -> list[tuple[str, Any]]:
    return [
        (leaf, child) for leaf, child in module.named_children() if is_linear(child) and "weight" in child._parameters
    ]


def _shape(module: Any) -> tuple[int, int]:
    return in_features(module), out_features(module)


def _reads_whole_width(parent: nn.Module) -> bool:
    """Return True if a forward reads the width from its input's shape, or gets something for every head."""
    source = "".join(methods_of(type(parent)))
    widths = re.findall(r"\w+, *\w+, *([A-Za-z]\w*) = \w+\.(?:size\(\)|shape)\n", source)
    takes = inspect.signature(parent.forward).parameters
    return (
        any(re.search(rf"(view|reshape)\([^)]*(?<![.\w]){name}\b", source) for name in widths)
        or any(re.search(r"(position|attention)_bias|rel_(2d_)?pos$", name) for name in takes)
        or "Sparse" in type(parent).__name__
        or "hidden_dim=" in source
    )
