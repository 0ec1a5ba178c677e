"""HF's own tensor-parallel plans, read as rules.

``model.tp_plan`` (``base_model_tp_plan`` of the config and the head's) maps module patterns to style names of
transformers' DTensor implementation. Here they become styles of :mod:`tp_plugin.plans.plan`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from tp_plugin.errors import TensorParallelError
from tp_plugin.plans import plan as p
from tp_plugin.plans.plan import Rule

STYLE_OF = {
    "colwise": p.COLUMN,
    "rowwise": p.ROW,
    "colwise_gather_output": p.COLUMN_GATHER,
    "colwise_rep": p.COLUMN_GATHER,
    "rowwise_split_input": p.ROW_SPLIT,
    "rowwise_rep": p.ROW_SPLIT,
    "packed_colwise": p.COLUMN,
    "packed_rowwise": p.ROW,
    "embedding_rowwise": p.VOCAB_EMBEDDING,
    "embedding_colwise": p.VOCAB_EMBEDDING,  # the vocabulary is sharded always: the head needs it so
    "replicated_with_grad_allreduce": p.PARTIAL,
    "sequence_parallel": p.REPLICATED,
    "replicate": p.REPLICATED,
    "local_params": p.REPLICATED,  # of the owner of bare parameters, each of which has an entry of its own
    "moe_tp_experts": p.EXPERTS,
    "moe_identity_expert": p.FIRST,
    "mla_kv_a_proj": p.LATENT,
    "all_reduce": p.REPLICATED,  # of a block whose parameters have entries of their own; the name of no layer of ours
}
"""HF's name of a style -> ours."""


def rules_of(model: nn.Module) -> list[Rule]:
    """The rules of the plans of ``model`` and of the models inside it, the outermost first.

    A transformers model has its plan as ``tp_plan``. Any other module may have one in its config, as
    ``base_model_tp_plan``, with patterns of names inside that module.

    Raises:
        TensorParallelError: a plan has an unsupported style; the message names it and the module.
    """
    rules: dict[str, Rule] = {}
    for scope, module, plan in _plans(model):
        vectors = _vectors(module)
        for pattern, style in plan.items():
            if style not in STYLE_OF:
                raise TensorParallelError(
                    f"{type(module).__name__}: the HF plan shards {pattern!r} in the unknown style {style!r}; give it "
                    "a rule in the 'plan' of the tp_plugin block, or use tp_size 1."
                )
            rule = _rule(pattern, style, "HF plan", vectors).within(scope)
            rules.setdefault(rule.pattern, rule)
    return list(rules.values())


def your_rule(model: nn.Module, pattern: str, style: str) -> Rule:
    """A rule of the user's with HF's style name.

    On the token embedding and the head it shards the vocabulary, as in HF's own plans. A pattern that matches
    parameters only may match no module: HF's plans name an expert's weights one by one.
    """
    rule = _rule(pattern, style, p.YOURS, _vectors(model))
    names = dict(model.named_modules())
    for at in parts_of(model).values() or [model]:
        for getter, kind, wanted in (
            ("get_input_embeddings", nn.Embedding, p.VOCAB_EMBEDDING),
            ("get_output_embeddings", nn.Linear, p.VOCAB_HEAD),
        ):
            module = asked(at, getter)
            if isinstance(module, kind) and any(rule.matches(n) for n, other in names.items() if other is module):
                return dataclasses.replace(rule, style=rule.style if rule.style == p.REPLICATED else wanted)
    named = any(rule.matches(name) for name, _ in model.named_parameters(remove_duplicate=False))
    return dataclasses.replace(rule, optional=named and not any(map(rule.matches, names)))


def in_our_words(rule: Rule) -> Rule:
    """``rule`` with an HF style translated to ours."""
    if rule.style not in STYLE_OF:
        return rule
    blocks = 2 if rule.style.startswith("packed") else rule.blocks
    return dataclasses.replace(rule, style=STYLE_OF[rule.style], blocks=blocks)


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost transformers models in ``model``, by name; ``model`` itself alone if it is one."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        # of its class: a module around a model may forward every attribute to it
        is_model = hasattr(type(module), "get_input_embeddings")
        if is_model and not any(not scope or name.startswith(f"{scope}.") for scope in found):
            found[name] = module
    return found


def asked(model: nn.Module, getter: str) -> Any:
    """The result of a transformers model's getter of its embedding or head; None without one."""
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None


def _plans(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, str]]]:
    """(name, module, plan) of every module with a plan."""
    seen: set[int] = set()  # configs of the modules around: a part of a model has its config too
    for name, module in model.named_modules():
        own = "tp_plan" in vars(module) or hasattr(type(module), "tp_plan")
        plan = module.tp_plan if own else None
        config = getattr(module, "config", None)
        if isinstance(plan, dict) and plan:
            yield name, module, plan
        elif not own and config is not None and id(config) not in seen:
            plan = getattr(config, "base_model_tp_plan", None)
            if isinstance(plan, dict):
                yield name, module, plan
        seen.add(id(config))


def _vectors(model: nn.Module) -> list[str]:
    return [name for name, param in model.named_parameters(remove_duplicate=False) if param.dim() == 1]


def _rule(pattern: str, style: str, source: str, vectors: Iterable[str]) -> Rule:
    rule = Rule(pattern, style, source)
    if style == "colwise" and any(map(rule.matches, vectors)):  # an attention's sinks
        return Rule(pattern, p.PER_HEAD, source, role="query")
    return in_our_words(rule)
