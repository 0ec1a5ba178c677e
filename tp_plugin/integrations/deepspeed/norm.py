"""DeepSpeed's gradient norm, with every element counted once.

DeepSpeed counts a parameter on a rank or not at all (``tensor_model_parallel``). That is exact for a shard that is all
this rank's own, and for a shard that is all a replica. Where one shard mixes both (two KV heads, one of which another
rank holds too) the norm gets a copy of the gradient in which the replica's part is zero. bf16 with gradients
accumulated in fp32 has an optimizer of its own, which is given the same. At stage 0 in fp32, where the engine clips
without keeping the norm, it is computed here altogether.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils.bwc import bwc_tensor_model_parallel_rank
from torch import nn

from tp_plugin.integrations.contract import Patches, contract
from tp_plugin.layout import ShardLayout
from tp_plugin.sharding import state_of

_WHY = "the gradient norm counts replicated key/value heads once through it"


def install(patches: Patches) -> None:
    """Lay the patches; gradients of parameters that no rank shares pass through untouched."""
    for optimizer in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        patches.replace(optimizer, "get_grad_norm_direct", _direct)
        patches.replace(optimizer, "complete_grad_norm_calculation_for_cpu_offload", _offloaded)
    patches.replace(BF16_Optimizer, "get_grads_for_norm", _listed)
    patches.replace(DeepSpeedEngine, "clip_fp32_gradients", _clip)


def check_contracts() -> None:
    """See :func:`tp_plugin.integrations.deepspeed.slot.check_contracts`."""
    for optimizer in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        # stage 3's is behind a profiling wrapper that hides its parameters
        visible = ["gradients", "params"] if optimizer is DeepSpeedZeroOptimizer else None
        contract(optimizer, "get_grad_norm_direct", visible, _WHY)
        contract(optimizer, "complete_grad_norm_calculation_for_cpu_offload", ["params"], _WHY)
        contract(optimizer, "get_param_id", ["param"], _WHY)
    contract(BF16_Optimizer, "get_grads_for_norm", ["for_clipping"], _WHY)
    contract(DeepSpeedEngine, "clip_fp32_gradients", [], _WHY)


def _mixed(param: nn.Parameter, rank: int) -> ShardLayout | None:
    """The layout of a parameter of which TP rank ``rank`` counts a part only; None for all others."""
    layout = getattr(param, "tp_layout", None)
    if layout is None or not layout.shared_intervals():
        return None
    return None if layout.owns_all(rank) or layout.owns_none(rank) else layout


def _owned(piece: torch.Tensor, param: nn.Parameter, rank: int, offset: int = 0) -> torch.Tensor:
    """A copy of ``piece``, elements [offset, offset + numel) of the flat shard, with what others count set to zero."""
    layout = _mixed(param, rank)
    if layout is None:
        return piece
    mask = torch.zeros(layout.local_shape(rank), dtype=torch.bool, device=piece.device)
    for start, stop, local in layout.owned(rank):
        mask.narrow(layout.dim or 0, local, stop - start).fill_(True)
    flat = piece.detach().flatten()
    window = torch.zeros(flat.numel(), dtype=torch.bool, device=piece.device)  # ZeRO-3 pads behind the last element
    inside = mask.flatten()[offset : offset + flat.numel()]
    window[: inside.numel()] = inside
    return flat * window


def _offset_of(optimizer: Any, params: list[nn.Parameter], index: int) -> int:
    """Where this rank's piece of ``params[index]`` starts in the flat parameter."""
    param = params[index]
    if hasattr(param, "ds_tensor"):  # ZeRO-3 cuts every parameter evenly over the data-parallel group
        return dist.get_rank(optimizer.dp_process_group) * param.ds_tensor.ds_numel
    group = next(i for i, own in enumerate(optimizer.params_in_partition) if own is params)
    return int(optimizer.first_offset[group]) if index == 0 else 0


def _direct(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def get_grad_norm_direct(self: Any, gradients: Any, params: Any, norm_type: float = 2) -> torch.Tensor:
        rank = self.model_parallel_rank
        if any(_mixed(param, rank) for param in params):
            real = [g for g in gradients if not getattr(g, "_zero_padding", False)]
            gradients = [
                _owned(g, p, rank, _offset_of(self, params, i))
                for i, (g, p) in enumerate(zip(real, params, strict=False))
            ]
        return original(self, gradients, params, norm_type)

    return get_grad_norm_direct


def _offloaded(original: Callable[..., Any]) -> Callable[..., Any]:
    def complete_grad_norm_calculation_for_cpu_offload(self: Any, params: Any) -> Any:
        for index, param in enumerate(params):
            key = self.get_param_id(param)
            if _mixed(param, self.model_parallel_rank) is None or key not in self.norm_for_param_grads:
                continue
            group, *_, start, count = self.grad_position[key]
            buffers = getattr(self, "fp32_partitioned_groups_flat", None) or self.single_partition_of_fp32_groups
            piece = buffers[group].grad.view(-1).narrow(0, int(start), int(count))
            owned = _owned(piece, param, self.model_parallel_rank, _offset_of(self, params, index))
            where = self.norm_for_param_grads[key].device  # the buffers are the CPU's, and the sum may not be
            self.norm_for_param_grads[key] = torch.linalg.vector_norm(owned.float()).to(where)
        return original(self, params)

    return complete_grad_norm_calculation_for_cpu_offload


def _listed(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_grads_for_norm(self: Any, for_clipping: bool = False) -> Any:
        found = original(self, for_clipping)
        if for_clipping:
            return found
        gradients, of_experts = found
        rank = bwc_tensor_model_parallel_rank(mpu=self.mpu)
        pairs = zip(self.fp32_groups_gradients, self.bf16_groups, strict=True)
        owner = {id(g): param for grads, params in pairs for g, param in zip(grads, params, strict=True)}
        return [_owned(g, owner[id(g)], rank) for g in gradients], of_experts

    return get_grads_for_norm


def _clip(original: Callable[..., None]) -> Callable[..., None]:
    def clip_fp32_gradients(self: DeepSpeedEngine) -> None:
        record = state_of(self.module)
        if record is None:
            original(self)
            return
        params = [p for p in self.module.parameters() if p.grad is not None]
        counted = [
            torch.linalg.vector_norm(_owned(p.grad, p, record.mesh.tp_rank).float())
            for p in params
            if p.grad is not None and (record.mesh.tp_rank == 0 or getattr(p, "tensor_model_parallel", False))
        ]
        total = torch.stack(counted).square().sum() if counted else torch.zeros((), device=self.device)
        if record.mesh.tp_group is not None:
            dist.all_reduce(total, group=record.mesh.tp_group)
        norm = total.sqrt()
        scale = (self.gradient_clipping() / (norm + 1e-6)).clamp(max=1.0)
        for param in params:
            if param.grad is not None:
                param.grad.mul_(scale)
        self._global_grad_norm = norm

    return clip_fp32_gradients
