"""Rules written for a user: one line for an error message, or a skeleton of a full model to edit."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from tp_plugin.plans import plan as p
from tp_plugin.plans.attention import ROLES
from tp_plugin.plans.attention_attributes import HEAD_DIM
from tp_plugin.plans.checks import in_features, is_linear, out_features
from tp_plugin.plans.match import Modules
from tp_plugin.plans.plan import Plan, Rule, fold

IN_HF_WORDS = {p.COLUMN: "colwise", p.ROW: "rowwise"}


def line_for(modules: Modules, tp: int) -> str:
    """``{"layer1": "colwise", "layer2": "rowwise"}`` of two linear layers that fit, or one with its output gathered.

    Returns:
        JSON for the 'plan' of the tp_plugin block; empty where no linear layer is wide enough for ``tp`` ranks.
    """
    linears = [
        (name, module)
        for name, module in modules.items()
        if name and type(module) is nn.Linear and out_features(module) >= tp and name.rpartition(".")[2] not in ROLES
    ]  # queries, keys and values need their heads known
    for (column, first), (row, second) in itertools.pairwise(linears):
        if out_features(first) == in_features(second) and column.rpartition(".")[0] == row.rpartition(".")[0]:
            return json.dumps({column: "colwise", row: "rowwise"})
    return json.dumps({linears[0][0]: "colwise_gather_output"}) if linears else ""


def line_of(plan: Plan) -> str:
    """The inferred rules of ``plan`` as JSON, in HF's words, those of repeated layers once."""
    styles = {fold(name): plan.placements[name].style for name in plan.inferred()}
    return json.dumps({name: IN_HF_WORDS.get(style, style) for name, style in styles.items()})


def skeleton(modules: Modules, matched: Mapping[str, Rule], *, family: bool = False) -> dict[str, str | dict[str, Any]]:
    """The rules that count for a model, as a user would write them, and ``replicated`` for every other linear layer.

    The embedding and the head need no rules and get none. Layers of one kind get one pattern.

    Args:
        modules: full name -> module of the model, which may be on ``meta``.
        matched: the rule that counts for each module or parameter; they need not be enough to shard the model.
        family: for :func:`tp_plugin.register_family`, whose rules name all local attributes; otherwise for 'plan'.
    """
    written: dict[str, Any] = {
        name: _written(rule, modules, name, family) for name, rule in matched.items() if rule.source != "vocabulary"
    }
    written |= {
        name: p.REPLICATED for name, module in modules.items() if name and is_linear(module) and name not in matched
    }
    alike: dict[str, list[Any]] = {}
    for name in (*modules, *(name for name in written if name not in modules)):
        alike.setdefault(fold(name), []).append(written.get(name))
    return {
        fold(name) if all(one == rule for one in alike[fold(name)]) else name: rule for name, rule in written.items()
    }


def _written(rule: Rule, modules: Modules, name: str, family: bool) -> str | dict[str, Any]:
    fields: dict[str, Any] = {
        "role": rule.role,
        "blocks": rule.blocks if rule.blocks > 1 else None,
        "up": rule.up if rule.up > 1 else None,
        "region": "" if rule.source == p.INFERRED else rule.region,
        "head_dim": rule.head_dim,
        "local": dict(rule.local),
        "inputs": list(rule.inputs),
        "dim": rule.dim,
        "equivalent": rule.equivalent,
    }
    parent = modules.get(name.rpartition(".")[0])
    if rule.source == p.INFERRED and (not family or any(hasattr(parent, attribute) for attribute in HEAD_DIM)):
        fields["head_dim"] = None  # read off the module
    if rule.source == p.INFERRED and not family:
        fields["local"] = None
    fields = {key: value for key, value in fields.items() if value}
    return {"style": rule.style, **fields} if fields else rule.style


def as_json(rules: Mapping[str, Any]) -> str:
    """The ``tp_plugin`` block of a DeepSpeed config with these rules, one a line."""
    lines = ",\n".join(f"    {json.dumps(pattern)}: {json.dumps(rule)}" for pattern, rule in rules.items())
    return f'{{"tp_plugin": {{\n  "plan": {{\n{lines}\n  }}\n}}}}'


def as_python(rules: Mapping[str, Any], model_type: str) -> str:
    """A module that registers these rules for a model type."""
    lines = "\n".join(f"        {pattern!r}: {rule!r}," for pattern, rule in rules.items())
    return (
        f'"""Rules of {model_type}: import this module before the model is sharded."""\n\n'
        "from tp_plugin import register_family\n\n\n"
        f"@register_family({model_type!r})\ndef rules(model):\n    return {{\n{lines}\n    }}"
    )
