"""DeepSpeed's gradient norm, with every element counted once.

DeepSpeed counts a parameter on a rank or not at all (``tensor_model_parallel``). That is exact for a shard that is all
this rank's own, and for a shard that is all a replica. A shard can mix both: two KV heads, one of which is replicated
on another rank. Then the norm gets a copy of the gradient in which the replica's part is zero.

``BF16_Optimizer`` (bf16 with gradients accumulated in fp32) gets the same copy. At stage 0 in fp32 the engine clips
without recording the norm; there torch's function clips, and the norm is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils.bwc import bwc_tensor_model_parallel_rank
from torch import nn

from tp_plugin.integrations import zero3
from tp_plugin.integrations.features import NORMS
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.layout import ShardLayout
from tp_plugin.param_info import layout_of
from tp_plugin.sharding import state_of

_WHY = "the gradient norm counts replicated key/value heads once through it"
upstream = Upstream(NORMS)
for _optimizer in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
    upstream.needs(_optimizer, "get_param_id", ["param"], _WHY)


def _mixed(param: nn.Parameter, rank: int) -> ShardLayout | None:
    """The layout of a parameter if TP rank ``rank`` counts only a part of its shard; None otherwise."""
    layout = layout_of(param)
    if layout is None or not layout.shared_intervals():
        return None
    return None if layout.owns_all(rank) or layout.owns_none(rank) else layout


def _owned(piece: torch.Tensor, param: nn.Parameter, rank: int, offset: int = 0) -> torch.Tensor:
    """Copy ``piece``, elements [offset, offset + numel) of the flat shard; zero what other ranks count."""
    layout = _mixed(param, rank)
    if layout is None:
        return piece
    mask = torch.zeros(layout.local_shape(rank), dtype=torch.bool, device=piece.device)
    for start, stop, local in layout.owned(rank):
        mask.narrow(layout.dim or 0, local, stop - start).fill_(True)
    flat = piece.detach().flatten()
    window = torch.zeros(flat.numel(), dtype=torch.bool, device=piece.device)  # ZeRO-3 pads after the last element
    inside = mask.flatten()[offset : offset + flat.numel()]
    window[: inside.numel()] = inside
    return flat * window


def _offset_of(optimizer: Any, params: list[nn.Parameter], index: int) -> int:
    """Index, in the flat parameter, of the first element of this rank's piece of ``params[index]``."""
    param = params[index]
    if zero3.is_partitioned(param):
        return zero3.partition_range(param)[0]
    group = next(i for i, own in enumerate(optimizer.params_in_partition) if own is params)
    return int(optimizer.first_offset[group]) if index == 0 else 0


@upstream.patch(DeepSpeedZeroOptimizer, "get_grad_norm_direct", ["gradients", "params"], _WHY)
# no parameters: a profiling wrapper hides them
@upstream.patch(DeepSpeedZeroOptimizer_Stage3, "get_grad_norm_direct", None, _WHY)
def _get_grad_norm_direct(
    original: Callable[..., torch.Tensor], self: Any, gradients: Any, params: Any, norm_type: float = 2
) -> torch.Tensor:
    rank = self.model_parallel_rank
    if any(_mixed(param, rank) for param in params):
        real = [g for g in gradients if not getattr(g, "_zero_padding", False)]
        gradients = [
            _owned(g, p, rank, _offset_of(self, params, i)) for i, (g, p) in enumerate(zip(real, params, strict=False))
        ]
    return original(self, gradients, params, norm_type)


@upstream.patch(DeepSpeedZeroOptimizer, "complete_grad_norm_calculation_for_cpu_offload", ["params"], _WHY)
@upstream.patch(DeepSpeedZeroOptimizer_Stage3, "complete_grad_norm_calculation_for_cpu_offload", ["params"], _WHY)
def _complete_grad_norm_calculation_for_cpu_offload(original: Callable[..., Any], self: Any, params: Any) -> Any:
    rank = self.model_parallel_rank
    if any(_mixed(param, rank) for param in params):
        get_accelerator().synchronize()  # gradients may still be copied to the buffers that are read here
    for index, param in enumerate(params):
        key = self.get_param_id(param)
        if _mixed(param, rank) is None or key not in self.norm_for_param_grads:
            continue
        group, *_, start, count = self.grad_position[key]
        buffers = getattr(self, "fp32_partitioned_groups_flat", None) or self.single_partition_of_fp32_groups
        piece = buffers[group].grad.view(-1).narrow(0, int(start), int(count))
        owned = _owned(piece, param, rank, _offset_of(self, params, index))
        device = self.norm_for_param_grads[key].device  # the buffers are on the CPU, the sum may not be
        self.norm_for_param_grads[key] = torch.linalg.vector_norm(owned.float()).to(device)
    return original(self, params)


@upstream.patch(BF16_Optimizer, "get_grads_for_norm", ["for_clipping"], _WHY)
def _get_grads_for_norm(original: Callable[..., Any], self: Any, for_clipping: bool = False) -> Any:
    found = original(self, for_clipping)
    if for_clipping:
        return found
    gradients, of_experts = found
    rank = bwc_tensor_model_parallel_rank(mpu=self.mpu)
    pairs = zip(self.fp32_groups_gradients, self.bf16_groups, strict=True)
    owner = {id(g): param for grads, params in pairs for g, param in zip(grads, params, strict=True)}
    return [_owned(g, owner[id(g)], rank) for g in gradients], of_experts


@upstream.patch(DeepSpeedEngine, "clip_fp32_gradients", [], _WHY)
def _clip_fp32_gradients(original: Callable[..., None], self: DeepSpeedEngine) -> None:
    if state_of(self.module) is None:
        original(self)
    else:  # torch's function counts shards, see :mod:`tp_plugin.integrations.pytorch.parameters`
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.gradient_clipping())
        self._global_grad_norm = norm
