"""Check one architecture: the plan of the full model on ``meta``, and the parity of a tiny copy on real ranks."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import torch
from torch import nn

from tp_plugin.config import TensorParallelConfig
from tp_plugin.errors import TensorParallelError
from tp_plugin.layers.generators import same_draws
from tp_plugin.mesh import ParallelMesh
from tp_plugin.model_check.fork_server import on_ranks
from tp_plugin.model_check.parity import Parity, compare_sharded, reproducible
from tp_plugin.model_check.shrink_config import shrunk_config
from tp_plugin.model_check.tiny_model import TinyModel, input_candidates
from tp_plugin.plans import Plan, plan_as
from tp_plugin.plans.plan import REPLICATED, fold, fold_all

LARGEST_COPY = 100_000_000
"""Most parameters of a copy that is run."""
LADDER: tuple[dict[str, bool] | None, ...] = (
    {"widths": True, "vocabulary": True},
    {"widths": False, "vocabulary": True},
    {"widths": False, "vocabulary": False},
    None,
)
"""Ways to shrink a config, the smallest copy first; None takes the config as it is."""


@dataclasses.dataclass(frozen=True)
class FullModel:
    """The full-size model under its plan.

    Attributes:
        parameters: their number.
        fraction: parameters of the fullest rank over all.
        mean: parameters of the average rank over all.
        source: sources of its rules.
        replicated: folded parameter name -> share of all parameters, the largest first.
        reasons: the same names -> reasons.
        plan: ``Plan.describe()``.
        refused: the reason if there is no plan; the rest is empty then.
    """

    parameters: int = 0
    fraction: float = 1.0
    mean: float = 1.0
    source: str = ""
    replicated: dict[str, float] = dataclasses.field(default_factory=dict)
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)
    plan: str = ""
    refused: str = ""


def on_meta(model_class: type[nn.Module], config: Any) -> nn.Module:
    """Build the model on the meta device."""
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


def full_model(model: nn.Module, config: TensorParallelConfig) -> FullModel:
    """Measure the share of ``model`` that a rank would hold under its plan; the model may be on ``meta``."""
    try:
        plan = plan_as(model, config)
    except TensorParallelError as refused:
        return FullModel(sum(q.numel() for q in model.parameters()), refused=str(refused))
    layouts = {
        id(getattr(model.get_submodule(name), leaf)): layout
        for name, placement in plan.placements.items()
        for leaf, layout in placement.layouts.items()
    }
    kept: dict[str, int] = {}
    reasons: dict[str, str] = {}
    total, numel = 0, [0] * config.tp_size
    for name, param in model.named_parameters():
        total += param.numel()
        layout = layouts.get(id(param))
        for rank in range(config.tp_size):
            numel[rank] += param.numel() if layout is None else math.prod(layout.local_shape(rank))
        if layout is None or not layout.is_sharded:
            kept[fold(name)] = kept.get(fold(name), 0) + param.numel()
            reasons[fold(name)] = plan.replicated.get(name, "every rank's heads need all of it")
    shares = {name: n / total for name, n in sorted(kept.items(), key=lambda item: -item[1])}
    return FullModel(
        total, max(numel) / total, sum(numel) / len(numel) / total, sources(plan), shares, reasons, plan.describe()
    )


def sources(plan: Plan) -> str:
    """Name the sources of a plan's rules; the vocabulary's only if there is no other."""
    found = dict.fromkeys(placement.source for placement in plan.placements.values() if placement.layouts)
    return " + ".join([name for name in found if name != "vocabulary"] or found)


def tiny_model_of(model_class: type[nn.Module], config: Any) -> TinyModel:
    """Find the smallest copy of ``config`` that runs unsharded, and the inputs it runs with.

    Raises:
        TensorParallelError: none runs; the message has the first reason.
    """
    reasons: list[str] = []
    for options in LADDER:
        try:
            small = copy.deepcopy(config) if options is None else shrunk_config(config, **options)
            if model_class.__name__.endswith("SequenceClassification") and small.pad_token_id is None:
                small.pad_token_id = 0
            if (size := sum(q.numel() for q in on_meta(model_class, small).parameters())) > LARGEST_COPY:
                reasons.append(f"a copy scaled down by {options} still has {size:,} parameters")
                continue
            model = TinyModel(model_class, small).build()
        except Exception as failure:
            reasons.append(short(failure))
            continue
        for variant in range(sum(1 for _ in input_candidates(model))):
            specimen = TinyModel(model_class, small, variant)
            try:
                reason = reproducible(specimen)
            except Exception as failure:
                reason = short(failure)
            if reason is None:
                return specimen
            reasons.append(reason)
    raise TensorParallelError(f"no small copy of it runs unsharded: {reasons[0]}")


def check_on_ranks(
    model_class: type[nn.Module], config: Any, options: TensorParallelConfig, mesh: ParallelMesh
) -> tuple[Parity, TensorParallelConfig]:
    """Check a tiny copy of ``model_class(config)`` over ``mesh``; a collective call over the world.

    Returns:
        The result, and ``options`` without untested rules: inferred rules that the copy does not have, or that its
        inputs did not reach, become "replicated".
    """
    try:
        with same_draws(torch.device("cpu")):
            specimen = tiny_model_of(model_class, config)
    except TensorParallelError as failure:
        return Parity("untested", sentence=str(failure)), options
    found = compare_sharded(specimen, options, mesh)
    if options.infer == "checked":
        with same_draws(torch.device("cpu")):
            tried = _inferred(model_class, specimen.config, options)
            wanted = _inferred(model_class, config, options)
        doubtful = {name: REPLICATED for name in {**tried, **wanted} if name not in tried or name in found.unreached}
        options = dataclasses.replace(options, plan={**options.plan, **doubtful})
        found = dataclasses.replace(found, unreached=[name for name in found.unreached if name not in doubtful])
    return found, options


def _inferred(model_class: type[nn.Module], config: Any, options: TensorParallelConfig) -> dict[str, None]:
    """Folded names of the modules whose rules would be inferred; empty if there is no plan."""
    try:
        plan = plan_as(on_meta(model_class, config), options, inferring=True)
    except Exception:  # refused, or its defaults describe no model
        return {}
    return dict.fromkeys(fold_all(plan.inferred()))


@dataclasses.dataclass(frozen=True)
class Checked:
    """A check's result.

    Attributes:
        parity: result of the tiny copy.
        full: the plan of the full model.
        remedy: if inferred rules are wrong, explicit rules with which the check passes.
    """

    parity: Parity
    full: FullModel
    remedy: dict[str, str] | None = None


def check(
    model_class: type[nn.Module], config: Any, options: TensorParallelConfig, *, timeout_s: float = 110.0
) -> Checked:
    """Check ``model_class(config)`` over ``options.tp_size`` processes of this machine; needs no accelerator.

    Raises:
        TensorParallelError: a rank died or took longer than ``timeout_s``.
    """

    def on_this_rank() -> tuple[Parity, TensorParallelConfig]:
        return check_on_ranks(model_class, config, options, ParallelMesh.create(options.tp_size))

    parity, options = on_ranks(options.tp_size, on_this_rank, timeout_s=timeout_s)[0]
    remedy = None
    if parity.verdict in ("differs", "broken"):
        remedy = _remedy(model_class, config, options, timeout_s)
    try:
        full = full_model(on_meta(model_class, config), options)
    except TensorParallelError:
        raise
    except Exception as failure:
        full = FullModel(refused=f"the full-size model cannot be built on the meta device: {short(failure)}")
    return Checked(parity, full, remedy)


def _remedy(
    model_class: type[nn.Module], config: Any, options: TensorParallelConfig, timeout_s: float
) -> dict[str, str] | None:
    """Find inferred regions that must be replicated for the check to pass; None if that is not enough."""
    try:
        plan = plan_as(on_meta(model_class, shrunk_config(config)), options, inferring=True)
    except Exception:  # no such config can be built at this size
        return None
    inferred = set(plan.inferred())
    kinds = {
        frozenset(fold_all([*region.columns, region.row])): None for region in plan.regions if region.row in inferred
    }
    for kind in [*kinds, frozenset().union(*kinds)] if kinds else []:
        rules = dict.fromkeys(sorted(kind), REPLICATED)
        tried = dataclasses.replace(options, plan={**options.plan, **rules})

        def on_this_rank(tried: TensorParallelConfig = tried) -> str:
            return check_on_ranks(model_class, config, tried, ParallelMesh.create(tried.tp_size))[0].verdict

        if set(on_ranks(options.tp_size, on_this_rank, timeout_s=timeout_s)) == {"equal"}:
            return rules
    return None


def short(failure: BaseException) -> str:
    """An exception in one line."""
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {' '.join(lines)[:200] if lines else ''}"
