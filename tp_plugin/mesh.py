"""ParallelMesh: the tensor- and data-parallel process groups of this rank."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import torch
import torch.distributed as dist

from tp_plugin import exit_pause  # noqa: F401
from tp_plugin.errors import TensorParallelError

BEFORE_GROUPS: list[Callable[[], None]] = []
"""Called before groups are made, the first collective call of most programs; integrations add to them."""
# tp size -> the world and the mesh of its groups: groups are never freed, so each is made once
_MESHES: dict[int, tuple[object, ParallelMesh]] = {}


@dataclasses.dataclass(frozen=True, eq=False)
class ParallelMesh:
    """This rank's place in the ``dp x tp`` grid. TP ranks are neighbours in rank order: rank = dp_rank * tp + tp_rank.

    Also the object that ``deepspeed.initialize(mpu=...)`` takes. It has no ``initialize_sequence_parallel``,
    ``get_slice_parallel_*`` or ``get_sequence_*``: DeepSpeed takes other code paths where these exist.

    Attributes:
        tp_group: process group of the ranks that share one replica of the model; None when tp is 1.
        dp_group: process group of the ranks that have the same shard; None when there is one process.
    """

    tp_group: dist.ProcessGroup | None
    dp_group: dist.ProcessGroup | None
    tp_rank: int = 0
    tp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1

    @classmethod
    def single(cls) -> ParallelMesh:
        """The mesh of one process."""
        return cls(None, None)

    @classmethod
    def create(cls, tp_size: int) -> ParallelMesh:
        """Make groups for ``tp_size``, once in a process; a collective call over the world.

        A process that has not chosen a GPU gets its own first, see :func:`take_device`.

        Raises:
            TensorParallelError: no process group, or the world size is not a multiple of ``tp_size``.
        """
        if tp_size == 1 and not dist.is_initialized():
            return cls.single()
        check_world(tp_size)
        take_device()
        mesh = cls.noted(tp_size)
        if mesh is None:
            for check in BEFORE_GROUPS:
                check()
            world = dist.get_world_size()
            if tp_size == 1:  # groups of one rank are not needed
                mesh = cls(None, dist.group.WORLD, dp_rank=dist.get_rank(), dp_size=world)
            else:
                tp_group = _group_among([list(range(start, start + tp_size)) for start in range(0, world, tp_size)])
                dp_group = _group_among([list(range(k, world, tp_size)) for k in range(tp_size)])
                mesh = cls.of_groups(tp_group, dp_group)
            mesh.note()
        return mesh

    def note(self) -> None:
        """Let :meth:`create` return this mesh for its ``tp_size``."""
        _MESHES[self.tp_size] = dist.group.WORLD, self

    @staticmethod
    def noted(tp_size: int) -> ParallelMesh | None:
        """The mesh that :meth:`create` would return without making groups."""
        made_in, mesh = _MESHES.get(tp_size, (None, None))
        return mesh if made_in is dist.group.WORLD else None

    @classmethod
    def of_groups(cls, tp_group: dist.ProcessGroup, dp_group: dist.ProcessGroup) -> ParallelMesh:
        """The mesh of existing groups (DeepSpeed's, a DeviceMesh's)."""
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
        """Number of hosts of this rank's TP group, by host name; a collective call over the TP group."""
        if self.tp_group is None:
            return 1
        import socket

        names: list[str] = [""] * self.tp_size
        dist.all_gather_object(names, socket.gethostname(), group=self.tp_group)
        return len(set(names))

    # ---- DeepSpeed's mpu -----------------------------------------------------------------------------------------

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
    """Make this process's own GPU the current one, as DeepSpeed's engine and accelerate do later.

    A model that is sharded or loaded before would otherwise be sent from GPU 0 by every rank of a host: NCCL refuses
    one GPU for two ranks. Any current GPU but the first was chosen by the script, and is left.
    """
    on_host = not torch.cuda.is_available() or _backends(dist.group.WORLD).get("cuda", "gloo") == "gloo"
    if on_host or torch.cuda.current_device() != 0:
        return
    bound = bound_device()
    own = bound.index if bound is not None else int(os.environ.get("LOCAL_RANK", "0"))
    if own and own < torch.cuda.device_count():  # some launchers show each process its own GPU only, as the first
        torch.cuda.set_device(own)


def comm_device(group: dist.ProcessGroup | None) -> torch.device:
    """Device from which tensors are sent over ``group``: the accelerator, if the group has a backend for it.

    Gloo sends from the host. None is one rank, which sends nothing.
    """
    accelerator = torch.accelerator.current_accelerator()
    if group is None or accelerator is None or _backends(group).get(accelerator.type, "gloo") == "gloo":
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def _backends(group: dist.ProcessGroup | None) -> dict[str, str]:
    """Type of device -> the backend of ``group`` for it; a group may have several."""
    pairs = dist.get_backend_config(group).split(",")
    return {device: backend for device, _, backend in (pair.partition(":") for pair in pairs)}


def _group_among(groups: list[list[int]]) -> dist.ProcessGroup:
    """This rank's group of ``groups``, a partition of the world; a collective call over the world.

    Where the world is bound to devices, NCCL splits its communicator once for all groups; ``new_group`` would split it
    once a group.
    """
    if bound_device() is not None:
        try:
            split = dist.split_group(split_ranks=groups)
        except RuntimeError:  # the backend cannot, on any rank
            split = None
        if split is not None:
            return split
    return dist.new_subgroups_by_enumeration(groups)[0]


def bound_device() -> torch.device | None:
    """The device that the world's process group is bound to, if any."""
    return getattr(dist.group.WORLD, "bound_device_id", None)


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
