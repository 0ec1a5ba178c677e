"""Meet the other ranks after work in which one of them may have failed alone, and left its peers in a collective.

No message of a process group reaches a rank that waits in another collective of it. The rank that failed would wait for
its peers, they for it, and its error would be shown after the group's timeout, or never.
"""

from __future__ import annotations

import time

import torch.distributed as dist

from tp_plugin import log
from tp_plugin.errors import sentence_of
from tp_plugin.mesh import ParallelMesh

SAID_AFTER_S = 5.0
"""Seconds a failure waits for the other ranks before it is logged: most are shared at once, and told together."""
PATIENCE_S = 60.0
"""Seconds a rank that failed waits for the others, who may be slower, before it ends by itself."""
_BESIDE: dict[object, dist.ProcessGroup] = {}


def prepare(mesh: ParallelMesh) -> None:
    """Make the groups of :func:`arrive`, once; a collective call over the world.

    They are groups of their own: in the one that the failed work used, messages of two calls could be mixed up.
    """
    if not dist.is_initialized():
        return
    world = dist.get_world_size()
    tp_groups = [list(range(start, start + mesh.tp_size)) for start in range(0, world, mesh.tp_size)]
    for group, partition in ((dist.group.WORLD, [list(range(world))]), (mesh.tp_group, tp_groups)):
        if group is not None and group not in _BESIDE:
            _BESIDE[group] = dist.new_subgroups_by_enumeration(partition, backend="gloo")[0]


def arrive(failure: Exception | None, doing: str, group: dist.ProcessGroup | None = None) -> None:
    """Wait for every rank of ``group`` after work with collectives inside; a collective call.

    A rank that failed logs so after :data:`SAID_AFTER_S`. If the others do not come in :data:`PATIENCE_S` they wait in
    a collective of that work: it raises its failure alone, and the end of its process ends them.

    Args:
        failure: of this rank in that work; None if it went well.
        doing: the work, for the message.
        group: a group of a mesh that was prepared; None is the world.

    Raises:
        Exception: ``failure``, on this rank alone.
        RuntimeError: the work went well here, and another rank has ended.
    """
    if not dist.is_available() or not dist.is_initialized():
        return
    work = dist.barrier(_BESIDE[dist.group.WORLD if group is None else group], async_op=True)
    since, said = time.monotonic(), False
    while failure is not None and not work.is_completed():
        time.sleep(0.001)
        waited = time.monotonic() - since
        if waited > PATIENCE_S:
            raise failure
        if waited > SAID_AFTER_S and not said:
            said = True
            log.warning(
                f"rank {dist.get_rank()} failed in {doing} ({sentence_of(failure)}) and waits up to {PATIENCE_S:.0f} s "
                "for the others, which may wait for it.",
                rank0_only=False,
            )
    work.wait()
