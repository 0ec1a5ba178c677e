"""Sources of a model's rules, in order: the user's, a registered family's, HF's plan."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from tp_plugin.config import PlanRules
from tp_plugin.errors import TensorParallelError
from tp_plugin.plans import from_transformers
from tp_plugin.plans.heads import PACKINGS
from tp_plugin.plans.plan import QUANTITIES, STYLES, YOURS, Rule

FamilyRules = Callable[[nn.Module], PlanRules | Iterable[Rule]]
_FAMILIES: dict[str, FamilyRules] = {}


def register_family(*model_types: str) -> Callable[[FamilyRules], FamilyRules]:
    """Decorator: a function that gives the rules of models with one of these ``config.model_type``.

        @register_family("my_model")
        def my_rules(model):
            return {"blocks.*.attn.q_proj": "column", "blocks.*.attn.o_proj": "row"}

    They replace HF's plan for that type, also where such a model is a submodule of another. Styles are those of
    :data:`tp_plugin.plans.plan.STYLES`. A rule may be an object, as in the 'plan' of the tp_plugin block. The
    function may also return an iterable of :class:`tp_plugin.Rule`:

        Rule("**.attn.c_attn", "column", role="q|k|v", local=(("split_size", "query width"),))

    A rule that matches nothing is refused unless ``optional``. Every parameter inside a sharded block needs a rule.
    docs/extending.md has an example.

    Args:
        model_types: the types that the function, called with the model, returns rules for.
    """

    def add(function: FamilyRules) -> FamilyRules:
        _FAMILIES.update(dict.fromkeys(model_types, function))
        return function

    return add


def rules_for(model: nn.Module, own: PlanRules) -> list[Rule]:
    """All rules for ``model``, the most specific source first; the first that matches a module counts.

    Args:
        own: the user's rules, with styles of ours or of HF's (``colwise``, ``rowwise``, ...).

    Raises:
        TensorParallelError: an unknown style, role, quantity or key, a value of the wrong type, or an HF plan that asks
            for an unsupported style.
    """
    rules = [_own_rule(model, pattern, given) for pattern, given in own.items()]
    scopes = _scopes(model)
    for scope, model_type in scopes.items():
        given = _FAMILIES[model_type](model.get_submodule(scope))
        if isinstance(given, Mapping):
            written = [_rule(pattern, rule, "family") for pattern, rule in given.items()]
            given = [from_transformers.in_our_words(rule) for rule in written]
        rules += [rule.within(scope) for rule in given]
    for rule in rules:
        _require_known(rule)
    if "" in scopes:
        return rules
    return rules + [
        rule
        for rule in from_transformers.rules_of(model)
        if not any(rule.pattern.startswith(f"{scope}.") for scope in scopes)
    ]


def describes(model: nn.Module) -> bool:
    """Return True if a registered family has the rules of the full model; other modules then stay replicated."""
    return "" in _scopes(model)


def _scopes(model: nn.Module) -> dict[str, str]:
    """Name of the outermost module of each registered type in the model -> the type."""
    found: dict[str, str] = {}
    parts = from_transformers.parts_of(model)
    for name, module in model.named_modules():
        model_type = getattr(getattr(module, "config", None), "model_type", None)
        is_model = hasattr(type(module), "get_input_embeddings") or (name == "" and not parts)
        inside = any(scope == "" or name.startswith(f"{scope}.") for scope, kind in found.items() if kind == model_type)
        if model_type in _FAMILIES and is_model and not inside:
            found[name] = model_type
    return found


_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "style": (lambda value: isinstance(value, str), "the name of a style"),
    "role": (lambda value: isinstance(value, str), "the name of a role"),
    "blocks": (lambda value: _is_number(value, 1), "a number of sub-tensors, at least 1"),
    "up": (lambda value: _is_number(value, 1), "a number of dotted parts, at least 1"),
    "region": (lambda value: isinstance(value, str), "a text"),
    "head_dim": (lambda value: _is_number(value, 1), "the size of a head, at least 1"),
    "local": (
        lambda value: (
            isinstance(value, Mapping) and all(isinstance(one, str) for pair in value.items() for one in pair)
        ),
        f"an object of attribute names and what each counts ({', '.join(QUANTITIES)})",
    ),
    "inputs": (
        lambda value: isinstance(value, list | tuple) and all(isinstance(one, str) for one in value),
        "a list of argument names",
    ),
    "dim": (lambda value: _is_number(value, 0), "the number of a dimension, at least 0"),
    "equivalent": (lambda value: isinstance(value, bool), "true or false"),
    "optional": (lambda value: isinstance(value, bool), "true or false"),
}
"""Keys of a rule that is an object -> a test of its value, and the values in words."""


def _is_number(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _own_rule(model: nn.Module, pattern: str, given: str | Mapping[str, Any]) -> Rule:
    rule = _rule(pattern, given, YOURS)
    if rule.style not in from_transformers.STYLE_OF:
        return rule
    translated = from_transformers.your_rule(model, pattern, rule.style)
    fields = given.keys() - {"style"} if isinstance(given, Mapping) else ()
    return dataclasses.replace(translated, **{name: getattr(rule, name) for name in fields})


def _rule(pattern: str, given: str | Mapping[str, Any], source: str) -> Rule:
    """A rule written as a style, or as an object with "style" and other fields of :class:`Rule`."""
    fields: dict[str, Any] = {"style": given} if isinstance(given, str) else {**given}
    where = f"the rule for {pattern!r} in the plan"
    for key, value in fields.items():
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(_KEYS)}."
            raise TensorParallelError(f"{where} has the unknown key {key!r}; {hint}")
        will_do, words = _KEYS[key]
        if not will_do(value):
            raise TensorParallelError(f"{where} has {key!r}: {value!r}, which must be {words}.")
    if "style" not in fields:
        raise TensorParallelError(f"{where} lacks the key 'style'; choose one of {', '.join(STYLES)}.")
    fields |= {"local": tuple(fields["local"].items())} if "local" in fields else {}
    fields |= {"inputs": tuple(fields["inputs"])} if "inputs" in fields else {}
    return Rule(pattern, source=source, **fields)


def _require_known(rule: Rule) -> None:
    for what, value, known in (
        ("style", rule.style, STYLES),
        ("role", rule.role or "query", PACKINGS),
        *(("quantity", quantity, QUANTITIES) for _, quantity in rule.local),
    ):
        if value not in known:
            of_hf = f", or from HF's {', '.join(from_transformers.STYLE_OF)}" if what == "style" else ""
            raise TensorParallelError(
                f"unknown {what} {value!r} for {rule.pattern!r} in the plan; choose from {', '.join(known)}{of_hf}."
            )
