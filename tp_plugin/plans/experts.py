"""How the fused weights of a mixture of experts lie: every expert's intermediate width is dealt to the ranks.

The weights are ``[experts, 2 * width, hidden]`` and ``[experts, hidden, width]``, or both with their last two
dimensions exchanged; the first holds ``[gate|up]`` or, interleaved, gate and up in turn, or only an up projection.
Which of them it is can be told from the shapes and from what transformers notes on the module (``is_concatenated``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tp_plugin.errors import TensorParallelError
from tp_plugin.layers.dropout import has_dropout
from tp_plugin.layout import ShardLayout
from tp_plugin.plans import plan as p
from tp_plugin.plans.plan import MixturePlan, Placement, RegionPlan, Rule

UP = {"gate_up_proj": 2, "up_proj": 1}  # parameter -> widths it holds
DOWN = "down_proj"
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
"""Experts implementations of transformers that read nothing but the parameters, so that shards do as well."""
_ALIGNED = (8, 4)  # grouped_mm wants rows of whole 16 bytes: 8 elements in half precision, 4 in single


def check_implementation(model: nn.Module) -> str | None:
    """The experts implementation that a transformers model is set to; None for a model that has no such choice.

    Raises:
        TensorParallelError: it is one that was not tried with shards, or kernels of the hub replace whole blocks.
    """
    if getattr(model, "use_kernels", False):
        raise TensorParallelError(
            "the model's experts run in kernels of the hub, which tensor parallelism does not support; build it with "
            "use_kernels=False."
        )
    ask = getattr(model, "get_experts_implementation", None)
    chosen = {name for name in ask().values() if name} if callable(ask) else set()
    for name in sorted(chosen):
        if name not in IMPLEMENTATIONS:
            raise TensorParallelError(
                f"experts implementation {name!r} is not supported by tensor parallelism; choose one of "
                f"{', '.join(IMPLEMENTATIONS)} with model.set_experts_implementation."
            )
    return "grouped_mm" if "grouped_mm" in chosen else next(iter(chosen), None)


def place_experts(name: str, module: Any, rule: Rule, tp: int, implementation: str | None = None) -> Placement:
    """The layouts of the experts module ``name`` over ``tp`` ranks.

    Args:
        implementation: transformers' experts implementation, which may ask for aligned widths.

    Raises:
        TensorParallelError: parameters that are not understood, or a width that cannot be dealt to ``tp`` ranks.
    """
    params = dict(module.named_parameters())
    up = next((leaf for leaf in UP if leaf in params), None)
    known = {up, DOWN, f"{up}_bias", f"{DOWN}_bias"}
    strangers = sorted(set(params) - known)
    if up is None or DOWN not in params or params[up].dim() != 3 or params[DOWN].dim() != 3:
        raise TensorParallelError(
            f"{name!r} is a {type(module).__name__} with parameters {sorted(params)}; style {rule.style} needs "
            f"{' or '.join(UP)}, and {DOWN}, of three dimensions each."
        )
    if strangers or getattr(module, "has_post_expert_norm", False):
        what = strangers or "a norm on each expert's result"
        raise TensorParallelError(
            f"{name!r} has {what}, which may act on partial results; leave it out of the plan with the style "
            "'replicated'."
        )
    first = list(params[up].shape[1:])
    second = list(params[DOWN].shape[1:])
    dim = next((i for i in (0, 1) if first[i] == UP[up] * second[1 - i] and first[1 - i] == second[i]), None)
    if dim is None:
        raise TensorParallelError(
            f"{name!r}: {up} of shape {tuple(params[up].shape)} and {DOWN} of shape {tuple(params[DOWN].shape)} do not "
            "belong together; its layout needs rules of its own."
        )
    width = second[1 - dim]
    unit = _unit(name, width, tp, params[up].element_size() if implementation == "grouped_mm" else None)
    one = ShardLayout.even((width,), 0, tp, unit=unit)
    if UP[up] == 1:
        along = one
    elif getattr(module, "is_concatenated", True):
        along = ShardLayout.packed((2 * width,), 0, [one, one])
    else:
        along = ShardLayout.even((2 * width,), 0, tp, unit=2 * unit)
    layouts = {up: along.along(1 + dim, params[up].shape), DOWN: one.along(2 - dim, params[DOWN].shape)}
    if f"{up}_bias" in params:
        layouts[f"{up}_bias"] = along.along(1, params[f"{up}_bias"].shape)
    return Placement(name, rule.style, rule.source, layouts)


def _unit(name: str, width: int, tp: int, element_size: int | None) -> int:
    """Elements of the width that stay together."""
    if width < tp:
        raise TensorParallelError(
            f"the experts {name!r} have an intermediate width of {width}, fewer than the {tp} ranks; choose "
            f"tensor_parallel.autotp_size at most {width}."
        )
    if element_size is None:
        return 1
    aligned = [n for n in _ALIGNED if n * element_size % 16 == 0 and width % n == 0]
    if not aligned:  # grouped_mm does not take the whole width either, only its fallback does
        return 1
    unit = next((n for n in aligned if width // n >= tp), None)
    if unit is None:
        raise TensorParallelError(
            f"the experts {name!r} have an intermediate width of {width}, of which {tp} ranks cannot each hold rows of "
            f"whole 16 bytes as grouped_mm needs them; choose tensor_parallel.autotp_size at most "
            f"{width // aligned[-1]} or call model.set_experts_implementation('eager')."
        )
    return unit


def join_mixtures(
    experts: Sequence[str], regions: Sequence[RegionPlan], matched: Mapping[str, Rule], modules: Mapping[str, Any]
) -> tuple[list[MixturePlan], list[RegionPlan]]:
    """Experts with the shared experts beside them, and the regions that are left.

    Shared experts that get the same hidden states come in through the experts' door; where a rule of style ``sum``
    says that the block adds the results up, they leave with them too.
    """
    mixtures, left = [], list(regions)
    for name in experts:
        block = name.rpartition(".")[0]
        shared = [region for region in left if _is_shared(region, block, modules)]
        left = [region for region in left if region not in shared]
        names = tuple(region.block for region in shared)
        adds = block in matched and matched[block].style == p.SUM
        summed = adds and bool(shared) and _all_partial(block, names, matched, modules)
        mixtures.append(MixturePlan(block, name, names, tuple(region.row for region in shared), summed))
    return mixtures, left


def _all_partial(block: str, shared: Sequence[str], matched: Mapping[str, Rule], modules: Mapping[str, Any]) -> bool:
    """Whether everything shared in ``block`` gives partial results, or scales them: a whole one would be summed too."""
    found = [f"{block}.{leaf}" for leaf, child in modules[block].named_children() if leaf.startswith("shared")]
    scales = {name for name, rule in matched.items() if rule.style == p.ENTER}
    return all(name in shared or name in scales or next(modules[name].parameters(), None) is None for name in found)


def _is_shared(region: RegionPlan, block: str, modules: Mapping[str, Any]) -> bool:
    """Whether a region is one of the shared experts of ``block``, with nothing in it that must stay outside the door.

    One that drops anything stays a region of its own, which derives its randomness.
    """
    parent, _, leaf = region.block.rpartition(".")
    if parent != block or not leaf.startswith("shared") or has_dropout(modules[region.block]):
        return False
    inside = {name for name, module in modules.items() if name.startswith(f"{region.block}.") and module._parameters}
    return inside == {*region.columns, region.row} and not modules[region.block]._parameters
