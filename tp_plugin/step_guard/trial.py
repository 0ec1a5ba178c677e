"""Try inferred rules on a small copy of the model, on the ranks that will train it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from tp_plugin.config import PlanRules, TensorParallelConfig
from tp_plugin.errors import TensorParallelError
from tp_plugin.mesh import ParallelMesh
from tp_plugin.model_check.check import check_on_ranks
from tp_plugin.model_check.parity import Parity
from tp_plugin.peers import prepare
from tp_plugin.plans import Plan, Rule, plan_as
from tp_plugin.plans.from_transformers import parts_of
from tp_plugin.plans.plan import REPLICATED, fold_all
from tp_plugin.plans.suggest import line_of
from tp_plugin.sharding import Sharding, adapters, shard_in_place, state_of
from tp_plugin.sharding.preconditions import unmet_precondition
from tp_plugin.sharding.require_same import facts_of, require_same
from tp_plugin.step_guard.guard import StepGuard, guard_of


def shard_proven(model: nn.Module, config: TensorParallelConfig, mesh: ParallelMesh) -> Sharding:
    """:func:`~tp_plugin.sharding.shard_in_place`, after a trial of the inferred rules.

    The trial runs a scaled-down copy of the model's config forward and backward, sharded over ``mesh`` and unsharded.
    It compares loss and gradients, and touches no weight of ``model``. Inferred rules that it does not reach are
    dropped. A collective call over the world.

    Raises:
        TensorParallelError: as ``shard_in_place``; the ranks have other settings or libraries; the trial failed, naming
            the module and its rule, or could not be made.
    """
    if state_of(model) is None:
        require_same(facts_of(model, config))
        prepare(mesh)
    return watched(model, shard_in_place(model, proven(model, config, mesh), mesh))


def watched(model: nn.Module, record: Sharding) -> Sharding:
    """Attach the step guard to a sharded model and return its record; see :mod:`tp_plugin.step_guard.guard`."""
    if guard_of(model) is None and record.mesh.tp_size > 1:
        StepGuard(adapters.bare_of(model), record)
    return record


def proven(
    model: nn.Module, config: TensorParallelConfig, mesh: ParallelMesh, *, unread: bool = False
) -> TensorParallelConfig:
    """``config`` with the result of the trial of inferred rules; itself if there are none. A collective call.

    ``unread``: the model's parameters are read later; the trial needs its config only.
    """
    if (
        config.infer != "checked"
        or mesh.tp_size == 1
        or state_of(model) is not None
        or unmet_precondition(model, unread=unread)
    ):
        return config  # shard_in_place names the unmet precondition, on all ranks together
    with adapters.taken_out(model) as (bare, _):
        plan = _plan_or_none(bare, config)
    return _tried(bare, plan, config, mesh) if plan is not None and plan.inferred() else config


def _plan_or_none(model: nn.Module, config: TensorParallelConfig) -> Plan | None:
    try:
        return plan_as(model, config)
    except TensorParallelError:
        return None


def _tried(model: nn.Module, plan: Plan, config: TensorParallelConfig, mesh: ParallelMesh) -> TensorParallelConfig:
    """Try each transformers model in ``model`` by itself; other modules have no config to build a copy from."""
    name = type(model).__name__
    parts = parts_of(model) or ({"": model} if hasattr(model, "config") else {})
    overruled: dict[str, str | Mapping[str, Any]] = {}
    untried = plan.inferred()
    for scope, part in parts.items():
        inside = [one for one in untried if not scope or one.startswith(f"{scope}.")]
        given = rules_within(config.plan, scope, part) if inside else None
        if given is None:
            continue
        found, options = check_on_ranks(type(part), part.config, dataclasses.replace(config, plan=given), mesh)
        if found.verdict == "untested" and not hasattr(part, "get_input_embeddings"):
            continue
        _require_equal(type(part).__name__, found)
        untried = [one for one in untried if one not in inside]
        rest = {pattern: rule for pattern, rule in options.plan.items() if pattern not in given}
        overruled |= {f"{scope}.{pattern}" if scope else pattern: rule for pattern, rule in rest.items()}
    known = [one for one, placement in plan.placements.items() if placement.layouts and one not in untried]
    if not known:
        raise TensorParallelError(
            f"the rules of {name} were inferred from its shapes and cannot be tried without a transformers config to "
            f"build a small copy from: {_remedy(f', such as {line_of(plan)},')}, or to 'trusted' to use them untried."
        )
    overruled |= dict.fromkeys(fold_all(untried), REPLICATED)
    return dataclasses.replace(config, plan={**config.plan, **overruled})


def rules_within(rules: PlanRules, scope: str, part: nn.Module) -> dict[str, str | Mapping[str, Any]] | None:
    """Rewrite the user's rules for the submodel ``part``, whose name in the model is ``scope``.

    None where a pattern cannot be split into the path to ``part`` and a pattern inside of it.
    """
    if not scope:
        return dict(rules)
    inside = [name for name, _ in (*part.named_modules(), *part.named_parameters(remove_duplicate=False)) if name]
    found: dict[str, str | Mapping[str, Any]] = {}
    ahead = scope.count(".") + 1
    for pattern, rule in rules.items():
        hit = [name for name in inside if Rule(pattern, REPLICATED).matches(f"{scope}.{name}")]
        if not hit:
            continue
        pieces = pattern.split(".")
        within = pattern if pieces[0] == "**" else ".".join(pieces[ahead:])
        if "**" in pieces[1:ahead] or [name for name in inside if Rule(within, REPLICATED).matches(name)] != hit:
            return None
        found[within] = rule
    return found


def _remedy(example: str = "") -> str:
    return (
        f"give rules for it in the 'plan' of the tp_plugin block{example} ('replicated' leaves a module unsharded), "
        "or set 'infer' there to 'off'"
    )


def _require_equal(name: str, found: Parity) -> None:
    if found.verdict == "equal":
        return
    if found.verdict == "untested":
        raise TensorParallelError(
            f"the rules of {name} were inferred from its shapes and could not be tried ({found.sentence}): "
            f"{_remedy()}, or to 'trusted' to use them as they are."
        )
    raise TensorParallelError(
        f"the rules inferred from the shapes of {name} are wrong, a small copy of it shows: {found.sentence}: "
        f"{_remedy()}."
    )
