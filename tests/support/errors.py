"""Errors of a sharded training against one process, and of replicas against each other."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from tp_plugin.param_info import layout_of


def worse(known: float, found: float) -> float:
    """The larger of two errors; a NaN wins, which ``max`` would let pass for no error."""
    return known if found <= known or math.isnan(known) else found


def relative(ours: torch.Tensor, theirs: torch.Tensor, least: float = 1e-12) -> float:
    """Norm of the difference over the norm of the truth, or over ``least`` where that is larger."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm().clamp_min(least))


def gradient_error(engine: Any, expected: dict[str, torch.Tensor]) -> float:
    """Worst relative error of a parameter's accumulated gradient, shard against the same shard of the truth.

    Relative to 1e-5 of the largest gradient at least: that of a key's bias is nothing but rounding noise.
    """
    from deepspeed.utils import safe_get_full_grad

    import tp_plugin.sharding

    worst, tp_rank = 0.0, tp_plugin.sharding.state_of(engine.module).mesh.tp_rank
    least = 1e-5 * max(float(grad.norm()) for grad in expected.values())
    for name, param in engine.module.named_parameters():
        if not param.requires_grad:
            continue
        grad = safe_get_full_grad(param) if engine.zero_optimization_stage() else param.grad
        if name not in expected:  # the truth has none
            assert grad is None or not grad.any(), f"{name} has a gradient"
            continue
        assert grad is not None, f"{name} has no gradient"
        layout = layout_of(param)
        wanted = expected[name] if layout is None else layout.shard(expected[name], tp_rank)
        worst = worse(worst, relative(grad.reshape(wanted.shape), wanted, least))
    return worst


def replica_error(engine: Any) -> float:
    """Largest difference of a parameter that several ranks hold, across the whole world.

    All of them go into one exchange a group, since a collective of a small model costs more than its bytes.
    """
    from deepspeed.runtime.zero import GatheredParameters

    import tp_plugin.sharding

    mesh = tp_plugin.sharding.state_of(engine.module).mesh
    params = list(engine.module.parameters())
    partitioned = any(hasattr(param, "ds_id") for param in params)
    with GatheredParameters(params) if partitioned else torch.no_grad():
        held = [(param.detach().clone(), layout_of(param)) for param in params]
    worst = 0.0
    if mesh.dp_group is not None:
        worst = _spread([(mine, mine) for mine, _ in held], mesh.dp_group)
    if mesh.tp_group is not None:
        shared = [_shared(mine, layout, mesh.tp_rank) for mine, layout in held]
        worst = worse(worst, _spread([bounds for bounds in shared if bounds is not None], mesh.tp_group))
    return worst


Bounds = tuple[torch.Tensor, torch.Tensor]
"""Smallest and largest value of each element; infinities turned around where this rank does not hold it."""


def _spread(bounds: list[Bounds], group: Any) -> float:
    """Largest difference of an element between the ranks of ``group``, which hold the same tensors."""
    if not bounds:
        return 0.0
    low, high = (torch.cat([one.double().flatten() for one in side]) for side in zip(*bounds, strict=True))
    dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
    return float((high - low).max())


def _shared(mine: torch.Tensor, layout: Any, tp_rank: int) -> Bounds | None:
    """What TP ranks hold together of a parameter; None if each has its own shard."""
    if layout is None:
        return mine, mine
    if not layout.shared_intervals():
        return None
    full = torch.full(layout.shape, float("nan"))
    for index, start, stop in _held(layout, tp_rank):
        full.narrow(layout.dim, start, stop - start).copy_(mine.narrow(layout.dim, index, stop - start))
    return full.nan_to_num(float("inf")), full.nan_to_num(float("-inf"))


def _held(layout: Any, rank: int) -> list[tuple[int, int, int]]:
    out, local = [], 0
    for start, stop in layout.parts[rank]:
        out.append((local, start, stop))
        local += stop - start
    return out
