"""``gather``, ``gather_for_metrics`` and ``reduce`` count each sample once.

Accelerate collects over the whole world, where the ranks of a TP group bring the same samples: metrics would see them
tp times, and the last, partial batch would be cut in the wrong place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import accelerate.accelerator
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import operations
from accelerate.utils.operations import recursively_apply

from tp_plugin.collectives import all_gather, all_reduce_, broadcast_
from tp_plugin.integrations.accelerate.degree import parallel_mesh, tp_size
from tp_plugin.integrations.contract import Patches, contract
from tp_plugin.lazy import materialise_outputs


def check_contracts() -> None:
    once = "metrics would count every sample once a TP rank"
    contract(Accelerator, "gather", ["tensor"], once)
    contract(Accelerator, "gather_for_metrics", ["input_data", "use_gather_object"], once)
    contract(Accelerator, "reduce", ["tensor", "reduction", "scale"], "sums would be tp times too large")
    contract(accelerate.accelerator, "gather_object", ["object"], once)
    contract(operations, "verify_operation", ["function"], "debug mode compares shapes before our gather")


def install(patches: Patches) -> None:
    patches.replace(Accelerator, "gather", _gather_method)
    patches.replace(Accelerator, "reduce", _reduce_method)
    # the name that gather_for_metrics looks up; accelerate.utils.gather_object stays as it is
    patches.replace(accelerate.accelerator, "gather_object", _gather_object_function)


def _gather_method(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def gather(self: Accelerator, tensor: Any) -> Any:
        return original(self, tensor) if tp_size() == 1 else gather_samples(tensor)

    return gather


def _reduce_method(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def reduce(self: Accelerator, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        # any one rank may raise the flag of set_trigger(), and a maximum doesn't mind repetition: the whole world
        if tp_size() == 1 or reduction == "max" or tensor is self.flag_tensor:
            return original(self, tensor, reduction, scale)
        tensor = materialise_outputs(tensor)
        return recursively_apply(_sum_samples, tensor, error_on_other_type=True, mean=reduction == "mean")

    return reduce


def _gather_object_function(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def gather_object(object: Any) -> Any:
        degree = tp_size()
        if degree == 1:
            return original(object)
        brought: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(brought, materialise_outputs(object))
        return [item for items in brought[::degree] for item in items]

    return gather_object


@operations.verify_operation
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
