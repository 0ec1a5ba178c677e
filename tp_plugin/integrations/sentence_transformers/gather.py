"""In-batch negatives of all devices (``gather_across_devices``), of each replica once.

The library gathers over the whole world, where the ranks of a tensor-parallel group bring the same rows. Each would be
a negative of its own copies, and its gradient would count once a rank.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch

from tp_plugin.collectives import all_gather, copy_to_region, gather_from_region
from tp_plugin.integrations.features import GATHERED_NEGATIVES
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.mesh import ParallelMesh
from tp_plugin.sharding.state import sharded_models, state_of

MODULE = "sentence_transformers.util.distributed"


def declare(distributed: ModuleType) -> Upstream:
    """The functions that losses gather by, and find their own rows by; losses import both by name."""
    upstream = Upstream(GATHERED_NEGATIVES)
    for name, parameters, why, ours in (
        ("all_gather", ["tensor", "with_grad"], "every row would come tp times", _all_gather),
        ("get_rank", [], "it numbers the rows of this rank among those gathered", _get_rank),
    ):
        upstream.patch(distributed, name, parameters, why, everywhere=True)(ours)
    return upstream


def _mesh() -> ParallelMesh | None:
    """The mesh of this process's sharded models; None where nothing is sharded."""
    record = next((state_of(model) for model in sharded_models()), None)
    return None if record is None or record.mesh.tp_size == 1 else record.mesh


def _all_gather(original: Callable[..., torch.Tensor], tensor: torch.Tensor, with_grad: bool = False) -> torch.Tensor:
    mesh = _mesh()
    if mesh is None:
        return original(tensor, with_grad)
    if mesh.dp_group is None or mesh.dp_size == 1:
        return tensor
    if with_grad:
        sizes = [len(tensor)] * mesh.dp_size  # as the original requires
        joined = gather_from_region(tensor, mesh.dp_group, 0, sizes, purpose="negatives")
        # every replica's loss has a gradient for each row: they are summed on the way back
        return copy_to_region(joined, mesh.dp_group, purpose="negatives")
    parts = list(all_gather(tensor.detach().contiguous(), mesh.dp_group, purpose="negatives"))
    parts[mesh.dp_rank] = tensor  # with its gradient
    return torch.cat(parts)


def _get_rank(original: Callable[[], int]) -> int:
    mesh = _mesh()
    return original() if mesh is None else mesh.dp_rank
