"""Match rules to modules; add rules for the vocabulary and for second names of its parameters."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from tp_plugin.errors import TensorParallelError
from tp_plugin.plans import plan as p
from tp_plugin.plans.from_transformers import asked, parts_of
from tp_plugin.plans.plan import Rule

Modules = Mapping[str, Any]  # full name -> module; typed loosely, as nn.Module types its attributes
PARAMETER_STYLES = (p.PER_HEAD, p.ALIAS)
"""Styles whose pattern names a parameter."""


def parameters_of(modules: Modules) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter under every name it has."""
    for name, module in modules.items():
        for leaf, param in module.named_parameters(recurse=False):
            yield (f"{name}.{leaf}" if name else leaf), param


def match(rules: list[Rule], modules: Modules) -> tuple[dict[str, Rule], list[Rule]]:
    """First matching rule of every module, and of every parameter that a rule may name; HF's rules that match nothing.

    Raises:
        TensorParallelError: a rule that is neither HF's nor optional matches nothing.
    """
    of_modules = [rule for rule in rules if rule.style not in PARAMETER_STYLES]
    of_parameters = [rule for rule in rules if rule.style in PARAMETER_STYLES]
    matched: dict[str, Rule] = {}
    hit: set[Rule] = set()
    for names, those in ((modules, of_modules), (dict(parameters_of(modules)), of_parameters)):
        for name in names:
            for rule in those:
                if rule.matches(name):
                    hit.add(rule)
                    first = matched.setdefault(name, rule)
                    if rule.equivalent and first.source == p.YOURS:  # true of the module, whatever its style
                        matched[name] = dataclasses.replace(first, equivalent=True)
    idle = [rule for rule in rules if rule not in hit]
    for rule in idle:
        if rule.source != "HF plan" and not rule.optional:
            near = difflib.get_close_matches(rule.pattern, {p.fold(name) for name in modules}, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise TensorParallelError(f"the plan's rule {rule.pattern!r}: {rule.style} hits no module{hint}")
    return matched, [rule for rule in idle if rule.source == "HF plan"]


def vocabulary(model: nn.Module, modules: Modules, matched: Mapping[str, Rule]) -> dict[str, Rule]:
    """Rules that shard the token embedding, the head and what is tied to them over the vocabulary.

    A rule of the user's, or a family's ``replicated``, comes first.
    """
    found: dict[str, Rule] = {}
    weights: set[int] = set()
    getters = (("get_input_embeddings", p.VOCAB_EMBEDDING), ("get_output_embeddings", p.VOCAB_HEAD))
    for part, (getter, style) in itertools.product(parts_of(model).values() or [model], getters):
        module = asked(part, getter)
        if not isinstance(module, nn.Embedding if style == p.VOCAB_EMBEDDING else nn.Linear):
            continue  # of an image or of sound, not of words
        for name, candidate in modules.items():
            if candidate is module and not _settled(matched.get(name)):
                found[name] = Rule(name, style, "vocabulary")
                weights.add(id(module.weight))
    for name, module in modules.items():
        tied = id(module._parameters.get("weight")) in weights and name not in found
        if tied and not _settled(matched.get(name)):
            style = p.VOCAB_EMBEDDING if isinstance(module, nn.Embedding) else p.VOCAB_HEAD
            found[name] = Rule(name, style, "vocabulary")
    return found | _bias_names(modules, {name for name, rule in found.items() if rule.style == p.VOCAB_HEAD})


def _settled(rule: Rule | None) -> bool:
    return rule is not None and (rule.source == p.YOURS or (rule.source == "family" and rule.style == p.REPLICATED))


def _bias_names(modules: Modules, heads: set[str]) -> dict[str, Rule]:
    """A head's bias that its parent names too, as BERT's does: the parent does not add it again."""
    found = {}
    for head in heads:
        parent, _, leaf = head.rpartition(".")
        bias = modules[head]._parameters.get("bias")
        for other, param in modules[parent].named_parameters(recurse=False):
            if leaf and bias is not None and param is bias:
                name = f"{parent}.{other}" if parent else other
                found[name] = Rule(name, p.ALIAS, "vocabulary")
    return found
