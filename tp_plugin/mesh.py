"""ParallelMesh: the tensor- and data-parallel process groups of this rank."""

from __future__ import annotations

import atexit
import dataclasses
import os
import time

import torch
import torch.distributed as dist

from tp_plugin.errors import TensorParallelError

# one set of groups a tp size, with the world they are of: groups are never freed, so never made twice
_MESHES: dict[int, tuple[object, ParallelMesh]] = {}


@dataclasses.dataclass(frozen=True, eq=False)
class ParallelMesh:
    """This rank's place in the ``dp x tp`` grid. TP ranks are neighbours in rank order: rank = dp_rank * tp + tp_rank.

    Also the ``mpu`` face that ``deepspeed.initialize(mpu=...)`` asks for. It deliberately has no
    ``initialize_sequence_parallel``, ``get_slice_parallel_*`` or ``get_sequence_*``: their mere presence changes
    DeepSpeed's code paths.

    Attributes:
        tp_group: process group of the ranks that hold one replica together; None when tp is 1.
        dp_group: process group of the ranks that hold the same shard; None when there is one process.
    """

    tp_group: dist.ProcessGroup | None
    dp_group: dist.ProcessGroup | None
    tp_rank: int = 0
    tp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1

    @classmethod
    def single(cls) -> ParallelMesh:
        """One process, nothing parallel."""
        return cls(None, None)

    @classmethod
    def create(cls, tp_size: int) -> ParallelMesh:
        """Groups for ``tp_size``, made once in a process; a collective call over the whole world.

        A process that has chosen no GPU gets its own first, see :func:`take_device`.

        Raises:
            TensorParallelError: no process group, or the world size is not a multiple of ``tp_size``.
        """
        if tp_size == 1 and not dist.is_initialized():
            return cls.single()
        check_world(tp_size)
        take_device()
        made_in, mesh = _MESHES.get(tp_size, (None, None))
        if mesh is None or made_in is not dist.group.WORLD:
            world = dist.get_world_size()
            tp_group, _ = dist.new_subgroups_by_enumeration(
                [list(range(start, start + tp_size)) for start in range(0, world, tp_size)]
            )
            dp_group, _ = dist.new_subgroups_by_enumeration([list(range(k, world, tp_size)) for k in range(tp_size)])
            mesh = cls.of_groups(tp_group, dp_group)
            _MESHES[tp_size] = dist.group.WORLD, mesh
        return mesh

    @classmethod
    def of_groups(cls, tp_group: dist.ProcessGroup, dp_group: dist.ProcessGroup) -> ParallelMesh:
        """The mesh of groups somebody else made (DeepSpeed's, a DeviceMesh's)."""
        return cls(
            tp_group if dist.get_world_size(tp_group) > 1 else None,
            dp_group,
            dist.get_rank(tp_group),
            dist.get_world_size(tp_group),
            dist.get_rank(dp_group),
            dist.get_world_size(dp_group),
        )

    def __deepcopy__(self, memo: dict) -> ParallelMesh:
        raise TensorParallelError("a sharded model cannot be copied, its process groups are one; copy before sharding.")

    def hosts_spanned(self) -> int:
        """How many hosts this rank's TP group lies on, by host name; a collective call over the TP group."""
        if self.tp_group is None:
            return 1
        import socket

        names: list[str] = [""] * self.tp_size
        dist.all_gather_object(names, socket.gethostname(), group=self.tp_group)
        return len(set(names))

    # ---- the mpu face --------------------------------------------------------------------------------------------

    def get_model_parallel_rank(self) -> int:
        return self.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self.tp_size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.tp_group

    def get_data_parallel_rank(self) -> int:
        return self.dp_rank

    def get_data_parallel_world_size(self) -> int:
        return self.dp_size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self.dp_group

    def get_tensor_model_parallel_rank(self) -> int:
        return self.tp_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.tp_size

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.tp_group

    def get_tensor_model_parallel_src_rank(self) -> int:
        return self.dp_rank * self.tp_size


def take_device() -> None:
    """Make this process's own GPU the current one, as DeepSpeed's engine and accelerate do when they come.

    Whoever shards or loads a model before them would otherwise have every rank of a host send from its GPU 0, where
    NCCL finds one GPU twice, or another one than the process group is bound to. A GPU that was chosen is left: any
    but the first.
    """
    if not torch.cuda.is_available() or "nccl" not in dist.get_backend() or torch.cuda.current_device() != 0:
        return
    bound = bound_device()
    own = bound.index if bound is not None else int(os.environ.get("LOCAL_RANK", "0"))
    if own and own < torch.cuda.device_count():  # a launcher may show each process one GPU only, its first
        torch.cuda.set_device(own)


def bound_device() -> torch.device | None:
    """The device that the world's process group was bound to when it was made, if any."""
    return getattr(dist.group.WORLD, "bound_device_id", None)


@atexit.register  # when this is imported, so that it comes after what scripts register
def _let_threads_finish() -> None:
    """Let threads of gloo's that wait for the interpreter have it before it is torn down, where they abort the process.

    They drop the tensors of the last collectives, for which they need it ("terminate called without an active
    exception", exit code -6, and the launcher ends the other ranks, which may be saving still). PyTorch has every
    script call ``destroy_process_group``, which does no more here; few do.
    """
    if dist.is_initialized():
        time.sleep(0.01)


def check_world(tp_size: int) -> None:
    """Raise unless the world size is a multiple of ``tp_size``, in the same words on every rank."""
    if not dist.is_initialized():
        raise TensorParallelError(
            f"tp_size={tp_size} needs one process a rank, and no process group is initialised; start the script with "
            "accelerate launch, deepspeed or torchrun."
        )
    world = dist.get_world_size()
    if world % tp_size:
        fits = [n for n in range(1, world + 1) if world % n == 0]
        raise TensorParallelError(
            f"the world size {world} is not divisible by tp_size {tp_size} (tensor_parallel.autotp_size); start a "
            f"multiple of {tp_size} processes or choose tp_size from {fits}."
        )
