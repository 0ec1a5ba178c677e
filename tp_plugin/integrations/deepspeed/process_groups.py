"""Process groups: one set for our mesh and DeepSpeed's engine, and those that a caller passes, compared with it.

Each communicator costs device memory (a few hundred MB of buffers under NCCL) and a collective call of the world.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups

from tp_plugin.errors import agree
from tp_plugin.integrations.features import SLOT
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.mesh import ParallelMesh, take_device

upstream = Upstream(SLOT)
for _name in ("_TENSOR_MODEL_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP"):
    upstream.needs(groups, _name, None, "a model that is sharded before its engine is made brings the groups")
_communication = importlib.import_module("deepspeed.comm.torch")  # as an attribute, that name is torch itself


@upstream.patch(groups, "_init_tp_mesh_device", ["tensor_model_parallel_size"], "it makes the groups the slot uses")
def _init_tp_mesh_device(
    original: Callable[..., Any], tensor_model_parallel_size: int = 1, data_parallel_size: int | None = None
) -> Any:
    if groups._TENSOR_MODEL_PARALLEL_GROUP is not None:
        return original(tensor_model_parallel_size, data_parallel_size)
    mesh = ParallelMesh.noted(tensor_model_parallel_size)
    if mesh is None or mesh.tp_group is None or data_parallel_size not in (None, mesh.dp_size):
        found = original(tensor_model_parallel_size, data_parallel_size)
        if tensor_model_parallel_size > 1:
            ParallelMesh.of_groups(groups.get_tensor_model_parallel_group(), groups.get_data_parallel_group()).note()
        return found
    groups._TENSOR_MODEL_PARALLEL_GROUP = groups._MODEL_PARALLEL_GROUP = mesh.tp_group
    groups._DATA_PARALLEL_GROUP = mesh.dp_group
    return mesh.dp_group, mesh.tp_group


@upstream.patch(_communication, "build_shm_op", [], "on CPU nothing is compiled when communication starts")
def _build_shm_op(original: Callable[[], Any]) -> Any:
    """Leave out the shared-memory collective that DeepSpeed compiles on machines without an accelerator.

    That takes half a minute, a C++ compiler, and a lock file: once a compiling process was killed, every later start
    waits forever. gloo does all that is needed there.
    """
    return None if get_accelerator().device_name() == "cpu" else original()


def refuse_other_groups(tp: int, mpu: Any, tp_group: Any) -> None:
    """Compare groups that a caller passes with those of ``autotp_size``; a collective call if there are any.

    Args:
        tp: the degree. Neighbours in rank order form a tensor-parallel group.
        mpu: argument of ``deepspeed.initialize``, or None.
        tp_group: argument of ``deepspeed.tp_model_init``, or the config's ``tp.tp_group``, or None.

    Raises:
        TensorParallelError: on every rank, with the ranks of both, if the groups of any rank differ.
    """
    if mpu is None and tp_group is None:
        return
    take_device()  # agree() sends from this process's GPU
    rank, world = dist.get_rank(), dist.get_world_size()
    own = {"tensor": list(range(rank // tp * tp, rank // tp * tp + tp)), "data": list(range(rank % tp, world, tp))}
    error = None
    try:
        given = [] if tp_group is None else [("tp_group=", "tensor", _ranks(tp_group))]
        if mpu is not None:
            getter = "get_tensor_model_parallel_group"
            tensor = getattr(mpu, getter if hasattr(mpu, getter) else "get_model_parallel_group")
            given += [("mpu=", "tensor", _ranks(tensor())), ("mpu=", "data", _ranks(mpu.get_data_parallel_group()))]
        for argument, kind, ranks in given:
            if ranks != own[kind] and error is None:
                error = (
                    f"{argument} has the ranks {ranks} in a {kind}-parallel group where tensor_parallel."
                    f"autotp_size {tp} puts {own[kind]}; leave it out, or make the groups of neighbouring ranks"
                )
    except Exception as failure:  # an mpu without such groups raises errors of its own
        error = (
            f"mpu= ({type(mpu).__name__}) cannot be compared with the process groups of tensor_parallel.autotp_size "
            f"({type(failure).__name__}); leave mpu= out"
        )
    agree(error)


def _ranks(group: Any) -> list[int]:
    return sorted(dist.get_process_group_ranks(group))
