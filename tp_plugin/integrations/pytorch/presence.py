"""Name ranks that run without tp_plugin before the first collective of ours, which they would not make.

A launcher starts each host by itself, so the variable or the module in front of a script may be missing on one. Its
ranks make other collectives than ours, and all wait. A rank that is registered before there is a process group leaves
a note in the group's store as the group is made. Before it makes groups of its own it looks for the notes of all.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.features import PRESENCE
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.mesh import BEFORE_GROUPS

PATIENCE_S = 60.0
"""Seconds for a note: all ranks have been in the making of the process group, and leave theirs at once."""
upstream = Upstream(PRESENCE)
upstream.needs(distributed_c10d, "_get_default_store", [], "ranks leave notes in it")
_NOTED_IN: list[Any] = []  # the process group in which this rank has left its note


def _note_of(rank: int) -> str:
    return f"tp_plugin/{rank}"


@upstream.patch(dist, "init_process_group", None, "ranks leave a note as the process group is made")
def _init_process_group(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    original(*args, **kwargs)
    if _leave_note():
        _NOTED_IN[:] = [dist.group.WORLD]


def _leave_note() -> bool:
    store = distributed_c10d._get_default_store()
    if store is not None:  # MPI has none
        store.set(_note_of(dist.get_rank()), "1")
    return store is not None


@upstream.then
def _look_before_groups() -> None:
    if dist.is_initialized():
        _leave_note()  # ranks that were registered earlier look for it
    if require_everywhere not in BEFORE_GROUPS:
        BEFORE_GROUPS.append(require_everywhere)


def require_everywhere() -> None:
    """Raise TensorParallelError on every rank with tp_plugin if another rank of the world has none.

    A process that was registered after its process group was made says nothing: the others may be later than it.
    """
    if not (_NOTED_IN and _NOTED_IN[0] is dist.group.WORLD):
        return
    store, world = distributed_c10d._get_default_store(), range(dist.get_world_size())
    try:
        store.wait([_note_of(rank) for rank in world], datetime.timedelta(seconds=PATIENCE_S))
    except RuntimeError as late:
        missing = [rank for rank in world if not store.check([_note_of(rank)])]
        raise TensorParallelError(
            f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of this job run without tp_plugin; "
            "start it alike on every host, by -m tp_plugin.run, tp-plugin exec or TP_PLUGIN=1."
        ) from late
