"""Where the rules of a model come from, in order: the user's, a registered family's, HF's plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import nn

from tp_plugin.errors import TensorParallelError
from tp_plugin.plans import from_transformers
from tp_plugin.plans.packing import PACKINGS
from tp_plugin.plans.plan import QUANTITIES, STYLES, Rule

FamilyRules = Callable[[nn.Module], Mapping[str, str] | Iterable[Rule]]
_FAMILIES: dict[str, FamilyRules] = {}


def register_family(*model_types: str) -> Callable[[FamilyRules], FamilyRules]:
    """Decorator: a function that gives the rules of models with one of these ``config.model_type``.

        @register_family("my_model")
        def my_rules(model):
            return {"blocks.*.attn.q_proj": "column", "blocks.*.attn.o_proj": "row"}

    They replace HF's plan for that type, also where such a model lies inside another. Styles are those of
    :data:`tp_plugin.plans.plan.STYLES`. Where a style is not enough, return an iterable of
    :class:`~tp_plugin.plans.plan.Rule`, which carries what is peculiar:

        Rule("**.attn.c_attn", "column", role="q|k|v", local=(("split_size", "query width"),))

    ``role`` and ``blocks`` say what is packed in a weight, ``up`` in which block it lies, ``local`` which attributes
    the forward reads as sizes of its tensors, ``inputs`` which arguments come with an entry a head. Rules that hit
    nothing are refused unless ``optional``; every parameter inside a block must be spoken of.

    Args:
        model_types: ``config.model_type`` of the models the function, called with the model, gives the rules for.
    """

    def add(function: FamilyRules) -> FamilyRules:
        _FAMILIES.update(dict.fromkeys(model_types, function))
        return function

    return add


def rules_for(model: nn.Module, own: Mapping[str, str]) -> list[Rule]:
    """All rules for ``model``, the most particular source first; the first that matches a module counts.

    Args:
        own: the user's rules, pattern -> style.

    Raises:
        TensorParallelError: an unknown style, role or quantity, or an HF plan that asks for an unsupported style.
    """
    rules = [Rule(pattern, style, "yours") for pattern, style in own.items()]
    scopes = _scopes(model)
    for scope, model_type in scopes.items():
        given = _FAMILIES[model_type](model.get_submodule(scope))
        if isinstance(given, Mapping):
            given = [Rule(pattern, style) for pattern, style in given.items()]
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
    """Whether a registered family speaks of the whole model: what it leaves out stays replicated on purpose."""
    return "" in _scopes(model)


def _scopes(model: nn.Module) -> dict[str, str]:
    """Where in the model a registered family begins: name of the outermost module of that type -> the type."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        model_type = getattr(getattr(module, "config", None), "model_type", None)
        is_model = name == "" or hasattr(module, "get_input_embeddings")
        inside = any(scope == "" or name.startswith(f"{scope}.") for scope, kind in found.items() if kind == model_type)
        if model_type in _FAMILIES and is_model and not inside:
            found[name] = model_type
    return found


def _require_known(rule: Rule) -> None:
    for what, value, known in (
        ("style", rule.style, STYLES),
        ("role", rule.role or "query", PACKINGS),
        *(("quantity", quantity, QUANTITIES) for _, quantity in rule.local),
    ):
        if value not in known:
            raise TensorParallelError(
                f"unknown {what} {value!r} for {rule.pattern!r} in the plan; choose from {', '.join(known)}."
            )
