"""``gather``, ``gather_object`` and ``reduce`` of accelerate count each sample once, whoever calls them.

Accelerate collects over the whole world, where the ranks of a TP group bring the same samples: metrics would see them
tp times, and the last, partial batch would be cut in the wrong place. The functions are imported by name all over (TRL
does), so what they call is replaced where there is such a thing.
"""

from __future__ import annotations

import functools
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
from tp_plugin.integrations.accelerate.degree import parallel_mesh, tp_size
from tp_plugin.integrations.contract import Patches, contract
from tp_plugin.lazy import materialise_outputs

_WITH_REDUCE = (operations, accelerate.utils, accelerate.accelerator)  # the modules whose name ``reduce`` is looked up


def check_contracts() -> None:
    once = "metrics would count every sample once a TP rank"
    contract(operations, "_gpu_gather", ["tensor"], once)
    contract(operations, "_gpu_gather_object", ["object"], once)
    for module in _WITH_REDUCE:
        contract(module, "reduce", ["tensor", "reduction", "scale"], "sums would be tp times too large")
    contract(Accelerator, "reduce", ["tensor", "reduction", "scale"], "any one rank may raise the flag of set_trigger")


def install(patches: Patches) -> None:
    patches.replace(operations, "_gpu_gather", _gather_function)
    patches.replace(operations, "_gpu_gather_object", _gather_object_function)
    for module in _WITH_REDUCE:
        patches.replace(module, "reduce", _reduce_function)
    patches.replace(Accelerator, "reduce", _reduce_method)


def _gather_function(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _gpu_gather(tensor: Any) -> Any:
        return original(tensor) if tp_size() == 1 else gather_samples(tensor)

    return _gpu_gather


def _gather_object_function(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _gpu_gather_object(object: Any) -> Any:
        degree = tp_size()
        if degree == 1:
            return original(object)
        brought: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(brought, materialise_outputs(object))
        return [item for items in brought[::degree] for item in items]

    return _gpu_gather_object


def _reduce_function(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def reduce(tensor: Any, reduction: str = "mean", scale: float = 1.0) -> Any:
        tensor = materialise_outputs(tensor)
        if tp_size() == 1 or reduction == "max":  # a maximum does not mind repetition
            return original(tensor, reduction, scale)
        return recursively_apply(_sum_samples, tensor, error_on_other_type=True, mean=reduction == "mean")

    return reduce


def _reduce_method(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def reduce(self: Accelerator, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        # any one rank may raise the flag of set_trigger(): all of them are asked, not one of each group
        reduction = "max" if tp_size() > 1 and tensor is self.flag_tensor else reduction
        return original(self, tensor, reduction, scale)

    return reduce


def gather_samples(tensor: Any) -> Any:
    """Tensors of all data-parallel ranks, joined along dim 0, in nested containers too.

    All ranks get the same: what tensor-parallel rank 0 of each group brought, also where its peers differ. Logits of a
    training forward pass, which nobody has computed yet, are computed.
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
