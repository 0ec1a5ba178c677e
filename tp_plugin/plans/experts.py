"""Layouts of the fused weights of a mixture of experts: every expert's intermediate width is sharded.

The weights are ``[experts, 2 * width, hidden]`` and ``[experts, hidden, width]``, or both with their last two
dimensions exchanged. The first has ``[gate|up]``, gate and up interleaved, or only an up projection. The shapes and
transformers' attribute ``is_concatenated`` tell them apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tp_plugin.errors import TensorParallelError
from tp_plugin.layers.dropout import has_dropout
from tp_plugin.layout import ShardLayout
from tp_plugin.plans import plan as p
from tp_plugin.plans.from_transformers import parts_of
from tp_plugin.plans.plan import MixturePlan, Placement, RegionPlan, Rule

UP = {"gate_up_proj": 2, "up_proj": 1}  # parameter -> widths it holds
DOWN = "down_proj"
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
"""Experts implementations of transformers that read the parameters alone, and work on shards."""
_ALIGNED = (8, 4)  # grouped_mm wants rows of whole 16 bytes: 8 elements in half precision, 4 in single


def check_implementation(model: nn.Module) -> str | None:
    """The experts implementation that the transformers models in ``model`` are set to; None without such a choice.

    Raises:
        TensorParallelError: the implementation was not tested with shards, or kernels of the hub replace blocks.
    """
    parts = list(parts_of(model).values()) or [model]
    if any(getattr(part, "use_kernels", False) for part in parts):
        raise TensorParallelError(
            "the model's experts run in kernels of the hub, which tensor parallelism does not support; build it with "
            "use_kernels=False."
        )
    asks = [ask for part in parts if callable(ask := getattr(part, "get_experts_implementation", None))]
    chosen = {name for ask in asks for name in ask().values() if name}
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
        TensorParallelError: unknown parameters, or a width that cannot be sharded over ``tp`` ranks.
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
    """Number of elements of the width that stay together."""
    if width < tp:
        raise TensorParallelError(
            f"the experts {name!r} have an intermediate width of {width}, fewer than the {tp} ranks; choose "
            f"tensor_parallel.autotp_size at most {width}."
        )
    if element_size is None:
        return 1
    aligned = [n for n in _ALIGNED if n * element_size % 16 == 0 and width % n == 0]
    if not aligned:  # grouped_mm does not take the full width either, its fallback alone does
        return 1
    unit = next((n for n in aligned if width // n >= tp), None)
    if unit is None:
        raise TensorParallelError(
            f"the experts {name!r} of width {width} do not give each of {tp} ranks rows of whole 16 bytes, as "
            f"grouped_mm needs them: choose tensor_parallel.autotp_size at most {width // aligned[-1]} or call "
            "model.set_experts_implementation('eager')."
        )
    return unit


def join_mixtures(
    experts: Sequence[str], regions: Sequence[RegionPlan], matched: Mapping[str, Rule], modules: Mapping[str, Any]
) -> tuple[list[MixturePlan], list[RegionPlan]]:
    """Experts with the shared experts beside them, and the remaining regions.

    Shared experts that get the same hidden states enter the region with the experts. Where a rule of style ``sum``
    says that the block adds the results up, they leave it together too.
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
    """Return True if every shared module of ``block`` gives or scales partial results; a full one would be summed."""
    found = [f"{block}.{leaf}" for leaf, child in modules[block].named_children() if leaf.startswith("shared")]
    scales = {name for name, rule in matched.items() if rule.style == p.ENTER}
    return all(name in shared or name in scales or next(modules[name].parameters(), None) is None for name in found)


def _is_shared(region: RegionPlan, block: str, modules: Mapping[str, Any]) -> bool:
    """Return True if a region is one of the shared experts of ``block``, and can enter and leave with the experts.

    A region with dropout stays a region of its own, which seeds its dropout by rank.
    """
    parent, _, leaf = region.block.rpartition(".")
    if parent != block or not leaf.startswith("shared") or has_dropout(modules[region.block]):
        return False
    inside = {name for name, module in modules.items() if name.startswith(f"{region.block}.") and module._parameters}
    return inside == {*region.columns, region.row} and not modules[region.block]._parameters
