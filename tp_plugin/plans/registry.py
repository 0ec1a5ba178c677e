"""Where the rules of a model come from, in order: the user's, a registered family's, HF's plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from tp_plugin.errors import TensorParallelError
from tp_plugin.plans import from_transformers
from tp_plugin.plans.families import moe
from tp_plugin.plans.plan import STYLES, Rule

FamilyRules = Callable[[nn.Module], Mapping[str, str]]
_FAMILIES: dict[str, FamilyRules] = {}


def register_family(model_type: str) -> Callable[[FamilyRules], FamilyRules]:
    """Decorator: a function that gives the rules, pattern -> style, of models with this ``config.model_type``.

        @register_family("my_model")
        def my_rules(model):
            return {"blocks.*.attn.q_proj": "column", "blocks.*.attn.o_proj": "row"}

    They replace HF's plan for that type. Styles are those of :data:`tp_plugin.plans.plan.STYLES`.
    """

    def add(function: FamilyRules) -> FamilyRules:
        _FAMILIES[model_type] = function
        return function

    return add


def rules_for(model: nn.Module, own: Mapping[str, str]) -> list[Rule]:
    """All rules for ``model``, the most particular source first; the first that matches a module counts.

    Args:
        own: the user's rules, pattern -> style.

    Raises:
        TensorParallelError: an unknown style, or an HF plan that asks for an unsupported one.
    """
    rules = [_rule(pattern, style, "yours") for pattern, style in own.items()]
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in _FAMILIES:
        return rules + [_rule(pattern, style, "family") for pattern, style in _FAMILIES[model_type](model).items()]
    return rules + moe.rules_of(model) + from_transformers.rules_of(model)


def _rule(pattern: str, style: str, source: str) -> Rule:
    if style not in STYLES:
        raise TensorParallelError(
            f"unknown style {style!r} for {pattern!r} in the plan; choose from {', '.join(STYLES)}."
        )
    return Rule(pattern, style, source)
