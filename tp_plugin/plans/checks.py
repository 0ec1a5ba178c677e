"""What has to hold of modules before they are sharded, each failure one sentence."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from tp_plugin.errors import TensorParallelError
from tp_plugin.layers.norm import EPSILON
from tp_plugin.layout import ShardLayout
from tp_plugin.plans import plan as p
from tp_plugin.plans.match import Modules, match, parameters_of
from tp_plugin.plans.plan import Placement, RegionPlan, Rule


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' ``Conv1D``, a linear layer whose weight is ``[in, out]``."""
    return any((c.__module__, c.__name__) == ("transformers.pytorch_utils", "Conv1D") for c in type(module).__mro__)


def out_dim(module: nn.Module) -> int:
    """Dimension of the weight along which the outputs lie."""
    return 1 if is_conv1d(module) else 0


def in_features(module: Any) -> int:
    """Inputs of a linear layer of either kind."""
    return module.weight.shape[1 - out_dim(module)]


def out_features(module: Any) -> int:
    """Outputs of a linear layer of either kind."""
    return module.weight.shape[out_dim(module)]


def require_width(name: str, size: int, tp: int) -> None:
    """Something for every rank."""
    if size < tp:
        raise TensorParallelError(
            f"{name!r} has {size} features to shard, fewer than the {tp} ranks; choose tensor_parallel.autotp_size "
            f"at most {size}."
        )


def require_linear(name: str, module: nn.Module, rule: Rule) -> None:
    """A linear layer whose forward is kept, or may be replaced."""
    if is_conv1d(module):
        return
    if not isinstance(module, nn.Linear):
        raise TensorParallelError(f"{name!r} is a {type(module).__name__}, style {rule.style} needs an nn.Linear.")
    if not rule.equivalent:
        require_super(name, module, nn.Linear)


def require_wide_norm(name: str, module: nn.Module) -> None:
    """An RMS norm with a weight and an epsilon, and nothing else."""
    has = [leaf for leaf, _ in module.named_parameters()]
    if has != ["weight"] or not any(epsilon in vars(module) for epsilon in EPSILON):
        raise TensorParallelError(
            f"{name!r} is a {type(module).__name__} with parameters {has}, style {p.WIDE_NORM} needs an RMS norm with "
            f"a weight and one of the attributes {', '.join(EPSILON)}."
        )


def require_super(name: str, module: nn.Module, base: type[nn.Module]) -> None:
    """A forward of its own is kept only if it calls super().forward, behind which the sharded one is put."""
    forward = type(module).forward
    if forward is not base.forward and "__class__" not in forward.__code__.co_freevars:
        raise TensorParallelError(
            f"{name!r} is a {type(module).__name__} whose forward does not call super().forward, so it cannot be "
            "sharded (quantised layers and adapters are such); leave it out of the plan with the style 'replicated'."
        )


def require_tied_alike(modules: Modules, placements: Mapping[str, Placement], matched: Mapping[str, Rule]) -> None:
    """Modules that share a parameter must agree on how it lies."""
    seen: dict[int, tuple[str, ShardLayout | None]] = {}
    for name, param in parameters_of(modules):
        if name in matched and matched[name].style == p.ALIAS:
            continue
        owner, _, leaf = name.rpartition(".")
        layout = placements[owner].layouts.get(leaf) if owner in placements else None
        other, known = seen.setdefault(id(param), (name, layout))
        if known != layout:
            raise TensorParallelError(
                f"{other} and {name} are one tied parameter and would be sharded differently; "
                "give both modules the same rule or untie them."
            )


def require_sums_kept(
    rules: Iterable[Rule], matched: Mapping[str, Rule], modules: Modules, blocks: Collection[str]
) -> None:
    """Your 'replicated' must not take away what makes the gradients of a block right that stays sharded.

    Args:
        rules: all, in order.
        matched: those that count.
        modules: of the model.
        blocks: of regions and mixtures.
    """
    yours = {name for name, rule in matched.items() if (rule.source, rule.style) == ("yours", p.REPLICATED)}
    if not yours:
        return
    others, _ = match([rule for rule in rules if rule.source != "yours"], modules)
    displaced = {name: others[name] for name in sorted(yours & others.keys())}
    for name, rule in displaced.items():
        around = rule.block(name)
        near = any(block == around or block.startswith(f"{around}.") for block in blocks)
        if rule.style in (p.PARTIAL, p.LATENT, p.ENTER) and near:
            raise TensorParallelError(
                f"your rule for {name!r} takes its style {rule.style} ({rule.source}) away, and it acts on tensors "
                "that stay sharded, which makes its gradient partial; keep the columns and the row there whole too, or "
                "leave it to its own rule."
            )
    given = [name for name, rule in matched.items() if rule.inputs]
    kept = next((name for name, rule in displaced.items() if rule.inputs), None)
    if kept and given:
        raise TensorParallelError(
            f"your rule keeps {kept!r} whole while {given[0]!r} stays sharded, and both are given one tensor with an "
            "entry for each head; keep all such attentions whole or none."
        )


def require_nothing_forgotten(
    regions: Iterable[RegionPlan],
    placements: Mapping[str, Placement],
    matched: Mapping[str, Rule],
    whole: Iterable[str],
) -> None:
    """A module inside a sharded block, of which no rule speaks, may act on sharded tensors unnoticed."""
    for block in dict.fromkeys(region.block for region in regions):
        for name in whole:
            owner = name.rpartition(".")[0]
            inside = owner == block or owner.startswith(f"{block}.") if block else "." not in owner
            if inside and not {owner, name} & (placements.keys() | matched.keys()):
                raise TensorParallelError(
                    f"parameter {name!r} lies inside the sharded block {block!r} and no rule says what it acts "
                    "on; add a rule for its module: 'partial' if on sharded tensors, 'replicated' if not."
                )
