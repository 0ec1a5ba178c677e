"""Values collected from all ranks: each sample once, and the full state dict.

Accelerate collects over the whole world, where the ranks of a TP group bring the same samples. Metrics would see them
tp times, and the last, partial batch would be truncated in the wrong place. ``gather``, ``gather_object`` and
``reduce`` are imported by name in many places (TRL is one), so what they call is replaced where possible.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate.accelerator
import accelerate.utils
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import operations
from accelerate.utils.operations import recursively_apply

from tp_plugin.collectives import all_gather, all_reduce_, broadcast_
from tp_plugin.errors import failing_together
from tp_plugin.integrations.accelerate.degree import parallel_mesh, tp_size
from tp_plugin.integrations.features import ACCELERATE
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.lazy import materialise_outputs
from tp_plugin.sharding import state_of
from tp_plugin.weights import full_state_dict

upstream = Upstream(ACCELERATE)
_ONCE = "metrics would count every sample once a TP rank"


@upstream.patch(operations, "_gpu_gather", ["tensor"], _ONCE)
def _gpu_gather(original: Callable[..., Any], tensor: Any) -> Any:
    return original(tensor) if tp_size() == 1 else gather_samples(tensor)


@upstream.patch(operations, "_gpu_gather_object", ["object"], _ONCE)
def _gpu_gather_object(original: Callable[..., Any], object: Any) -> Any:
    degree = tp_size()
    if degree == 1:
        return original(object)
    brought: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(brought, materialise_outputs(object))
    return [item for items in brought[::degree] for item in items]


_REDUCE, _SUMS = ["tensor", "reduction", "scale"], "sums would be tp times too large"


# the modules whose name ``reduce`` is looked up
@upstream.patch(operations, "reduce", _REDUCE, _SUMS)
@upstream.patch(accelerate.utils, "reduce", _REDUCE, _SUMS)
@upstream.patch(accelerate.accelerator, "reduce", _REDUCE, _SUMS)
def _reduce(original: Callable[..., Any], tensor: Any, reduction: str = "mean", scale: float = 1.0) -> Any:
    tensor = materialise_outputs(tensor)
    if tp_size() == 1 or reduction == "max":  # repetition does not change a maximum
        return original(tensor, reduction, scale)
    return recursively_apply(_sum_samples, tensor, error_on_other_type=True, mean=reduction == "mean")


@upstream.patch(Accelerator, "reduce", _REDUCE, "any one rank may raise the flag of set_trigger")
def _reduce_of_accelerator(
    original: Callable[..., Any], self: Accelerator, tensor: Any, reduction: str = "sum", scale: float = 1.0
) -> Any:
    # any one rank may raise the flag of set_trigger(): all ranks are asked, not one of each group
    reduction = "max" if tp_size() > 1 and tensor is self.flag_tensor else reduction
    return original(self, tensor, reduction, scale)


def gather_samples(tensor: Any) -> Any:
    """Join tensors of all data-parallel ranks along dim 0, in nested containers too.

    All ranks get the same: the values of tensor-parallel rank 0 of each group, also where its peers differ. Deferred
    logits of a training forward pass are computed.
    """
    return recursively_apply(_gather_one, materialise_outputs(tensor), error_on_other_type=True)


def _gather_one(tensor: torch.Tensor) -> torch.Tensor:
    mesh = parallel_mesh()
    rows = (tensor.detach() if tensor.ndim else tensor.detach().clone()[None]).contiguous()
    joined = torch.cat(all_gather(rows, mesh.dp_group, purpose="metrics"))
    broadcast_(joined, mesh.tp_group, purpose="metrics")
    return joined


def _sum_samples(tensor: torch.Tensor, mean: bool) -> torch.Tensor:
    mesh = parallel_mesh()
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    all_reduce_(total, mesh.dp_group, purpose="metrics")
    broadcast_(total, mesh.tp_group, purpose="metrics")
    if mean:
        total /= mesh.dp_size
    return total


# ---- the state dict -------------------------------------------------------------------------------------------------


@upstream.patch(Accelerator, "get_state_dict", ["model", "unwrap"], "it would return shards, or refuse")
def _get_state_dict(original: Callable[..., Any], self: Accelerator, model: Any, unwrap: bool = True) -> Any:
    """Return the full model, with any setting of gathering on save.

    Accelerate asks the engine to consolidate AutoTP's layers, or refuses without
    ``stage3_gather_16bit_weights_on_model_save``, even at ZeRO-1.
    """
    if state_of(model) is None:
        return original(self, model, unwrap)
    try:
        return full_state_dict(model)
    except ValueError as failure:
        # Trainer.save_model reads a ValueError as accelerate's refusal and continues without writing weights
        raise RuntimeError(str(failure)) from failure


@upstream.patch(Accelerator, "save_model", ["model", "save_directory"], "its failure on rank 0 is shared")
def _save_model(original: Callable[..., Any], self: Accelerator, model: Any, *args: Any, **options: Any) -> None:
    if state_of(model) is None:
        original(self, model, *args, **options)
        return
    with failing_together():
        original(self, model, *args, **options)
