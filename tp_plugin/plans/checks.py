"""Preconditions of modules that are sharded, and of plans; each failure is one sentence."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tp_plugin.errors import TensorParallelError
from tp_plugin.layers.linear import is_conv1d
from tp_plugin.layers.norm import EPSILON
from tp_plugin.layout import ShardLayout
from tp_plugin.plans import plan as p
from tp_plugin.plans.match import Modules, match, parameters_of
from tp_plugin.plans.plan import Placement, RegionPlan, Rule

SMALL = (7, 5)  # outputs, inputs of the copy that :func:`computes_linear` runs


def is_linear(module: nn.Module) -> bool:
    """Return True for a linear layer with the forward of PyTorch's or transformers' own."""
    return is_conv1d(module) or (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward)


def out_dim(module: nn.Module) -> int:
    """Dimension of the weight that has the outputs."""
    return 1 if is_conv1d(module) else 0


def in_features(module: Any) -> int:
    """Inputs of a linear layer of either kind."""
    return module.weight.shape[1 - out_dim(module)]


def out_features(module: Any) -> int:
    """Outputs of a linear layer of either kind."""
    return module.weight.shape[out_dim(module)]


def require_width(name: str, size: int, tp: int) -> None:
    """Require at least one feature for every rank."""
    if size < tp:
        raise TensorParallelError(
            f"{name!r} has {size} features to shard, fewer than the {tp} ranks; choose tensor_parallel.autotp_size "
            f"at most {size}."
        )


def require_linear(name: str, module: nn.Module, rule: Rule) -> None:
    """Require a linear layer whose forward is kept, or may be replaced."""
    if isinstance(module, nn.Linear) and "weight" not in module._parameters:
        raise TensorParallelError(
            f"the weight of {name!r} is computed from other parameters, as by weight_norm, and cannot be sharded; "
            "remove that, or give the layer the style 'replicated'."
        )
    if is_conv1d(module):
        return
    if not isinstance(module, nn.Linear) and not rule.equivalent:
        alike = "" if rule.style == p.VOCAB_HEAD else (
            ", or a module that gives F.linear(x, weight, bias) of a weight [out, in], a bias [out] or none, and "
            "nothing else"
        )  # fmt: skip
        raise TensorParallelError(
            f"{name!r} is a {type(module).__name__}, style {rule.style} needs an nn.Linear{alike}."
        )
    if not rule.equivalent:
        require_super(name, module, nn.Linear)


def require_wide_norm(name: str, module: nn.Module) -> None:
    """Require an RMS norm with a weight and an epsilon, and nothing else."""
    has = [leaf for leaf, _ in module.named_parameters()]
    if has != ["weight"] or not any(epsilon in vars(module) for epsilon in EPSILON):
        raise TensorParallelError(
            f"{name!r} is a {type(module).__name__} with parameters {has}, style {p.WIDE_NORM} needs an RMS norm with "
            f"a weight and one of the attributes {', '.join(EPSILON)}."
        )


def require_super(name: str, module: nn.Module, base: type[nn.Module]) -> None:
    """Require that a forward of its own calls super().forward, which becomes the sharded one."""
    forward = type(module).forward
    if forward is not base.forward and "__class__" not in forward.__code__.co_freevars:
        raise TensorParallelError(
            f"{name!r} is a {type(module).__name__} (quantised?) whose forward does not call super().forward, so it "
            "cannot be sharded; give it the style 'replicated'."
        )


def require_tied_alike(modules: Modules, placements: Mapping[str, Placement], matched: Mapping[str, Rule]) -> None:
    """Require one layout of a parameter that several modules share."""
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
    """Refuse a 'replicated' of the user's that displaces a sum of gradients which a sharded block needs.

    Args:
        rules: all rules, in order.
        matched: module name -> the rule that counts.
        modules: of the model.
        blocks: names of the blocks of regions and mixtures.
    """
    yours = {name for name, rule in matched.items() if (rule.source, rule.style) == (p.YOURS, p.REPLICATED)}
    if not yours:
        return
    others, _ = match([rule for rule in rules if rule.source != p.YOURS], modules)
    displaced = {name: others[name] for name in sorted(yours & others.keys())}
    for name, rule in displaced.items():
        around = rule.block(name)
        near = any(block == around or block.startswith(f"{around}.") for block in blocks)
        if rule.style in (p.PARTIAL, p.LATENT, p.ENTER) and near:
            raise TensorParallelError(
                f"your rule for {name!r} replaces the style {rule.style} ({rule.source}), which sums its partial "
                "gradient; make the columns and the row 'replicated' too, or drop it."
            )
    given = [name for name, rule in matched.items() if rule.inputs]
    kept = next((name for name, rule in displaced.items() if rule.inputs), None)
    if kept and given:
        raise TensorParallelError(
            f"your rule replicates {kept!r} while {given[0]!r} stays sharded, and both get one tensor with an entry "
            "for each head; replicate all such attentions or none."
        )


def require_nothing_forgotten(
    regions: Iterable[RegionPlan],
    placements: Mapping[str, Placement],
    matched: Mapping[str, Rule],
    whole: Iterable[str],
    modules: Modules,
    plain: Collection[str],
) -> None:
    """Refuse a module in a sharded block that no rule matches: it may act on sharded tensors.

    Args:
        plain: blocks without heads that are sharded by the user's rules alone.
    """
    around: dict[str, list[RegionPlan]] = {}
    for region in regions:
        around.setdefault(region.block, []).append(region)
    known = placements.keys() | matched.keys()
    inside: dict[str, list[str]] = {}
    for name in whole:
        owner = name.rpartition(".")[0]
        if owner not in known and name not in known:
            for block in _blocks_around(owner):
                inside.setdefault(block, []).append(name)
    for block, those in around.items():
        for name in inside.get(block, ()):
            owner = name.rpartition(".")[0]
            if not (block in plain and _stays_outside(owner, those, modules)):
                raise TensorParallelError(
                    f"parameter {name!r} is inside the sharded block {block!r} and no rule says what it acts "
                    "on; add a rule for its module: 'partial' if on sharded tensors, 'replicated' if not."
                )


def _blocks_around(owner: str) -> Iterator[str]:
    """Yield a module's name and those of the modules around it; "", the model, only around its direct children."""
    parts = owner.split(".") if owner else []
    yield from (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    if len(parts) <= 1:
        yield ""


def _stays_outside(name: str, regions: Iterable[RegionPlan], modules: Modules) -> bool:
    """Return True if a plain embedding or linear layer cannot silently act on shards of these regions of its block.

    An embedding takes integers. A linear layer as wide as the region raises on a shard. Another one could act on parts
    of a shard, unless it is made before the columns or after the row of an MLP.
    """
    module = modules[name]
    if type(module) is nn.Embedding:
        return True
    if type(module) is not nn.Linear:
        return False
    place = {other: index for index, other in enumerate(modules)}
    return all(
        module.in_features == in_features(modules[region.row])
        or not min(place[one] for one in region.columns) < place[name] < place[region.row]
        for region in regions
    )


def computes_linear(module: nn.Module) -> bool:
    """Return True if ``module``, of weight ``[out, in]`` and an optional bias, computes ``F.linear`` and its gradients.

    A copy with other weights of a few rows and columns is run; its attributes have the copy's sizes. A module with
    buffers, children, other parameters, parametrized or quantised weights is not linear.
    """
    params = dict(module._parameters)
    weight, bias = params.pop("weight", None), params.pop("bias", None)
    if weight is None or params or module._modules or any(True for _ in module.buffers()):
        return False
    if weight.dim() != 2 or (bias is not None and tuple(bias.shape) != (weight.shape[0],)):
        return False
    known = [param for param in (weight, bias) if param is not None]
    if any(type(param) is not nn.Parameter or not param.is_floating_point() for param in known):
        return False
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
            return _tried(module, tuple(weight.shape), bias is not None)
    except Exception:  # a forward that does not run on such a copy is not plainly a linear layer's
        return False


def _tried(module: Any, shape: tuple[int, ...], has_bias: bool) -> bool:
    torch.manual_seed(0)
    small = (SMALL[0],) * 2 if shape[0] == shape[1] else SMALL
    params = {"weight": nn.Parameter(torch.randn(small)), "bias": nn.Parameter(torch.randn(small[0]))}
    if not has_bias:
        del params["bias"]
    trial = copy.copy(module)
    sizes = dict(zip(shape, small, strict=True))
    attributes = {n: sizes.get(v, v) if type(v) is int else v for n, v in vars(module).items()}
    hooks = {name: type(value)() for name, value in attributes.items() if "_hooks" in name and isinstance(value, dict)}
    kept = {name: value for name, value in module._parameters.items() if value is None}
    trial.__dict__.update(attributes | hooks | {"_parameters": {**kept, **params}})
    for inputs in (torch.randn(2, 3, small[1]), torch.randn(4, small[1])):
        found = _run(trial, inputs, params)
        wanted = _run(lambda x: F.linear(x, params["weight"], params.get("bias")), inputs, params)
        if not all(a.shape == b.shape and torch.allclose(a, b, 1e-4, 1e-5) for a, b in zip(found, wanted, strict=True)):
            return False
    return True


def _run(forward: Any, inputs: torch.Tensor, params: dict[str, nn.Parameter]) -> list[torch.Tensor]:
    """Output, and gradients of the input and of the parameters."""
    leaf = inputs.clone().requires_grad_()
    out = forward(leaf)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), [leaf, *params.values()])]
