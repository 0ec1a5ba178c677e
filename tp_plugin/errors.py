"""Errors that every rank raises together.

A rank that raises alone leaves its peers waiting in the next collective until a timeout ends them.
So what can differ between ranks is checked through :func:`agree`, which raises on all ranks or on none.
"""

from __future__ import annotations

import sys
import time

import torch.distributed as dist

NO_FULLGRAPH = "a tensor-parallel model breaks graphs at its collectives: compile without fullgraph=True"
"""Shown by torch.compile where we opt out of it."""


class TensorParallelError(ValueError):
    """A tensor-parallel setup that would train wrongly or cannot work. The message says what to change."""


def sentence_of(failure: Exception) -> str:
    """What failed, in one sentence without its full stop: ours as it is, else the kind and what it says first."""
    if isinstance(failure, TensorParallelError):
        return str(failure)
    return f"{type(failure).__name__}: {reason_of(failure) or 'no reason given'}"


def reason_of(failure: Exception) -> str:
    """The first sentence of what an error of some library's says; "" if it says nothing."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return lines[0].split(". ")[0].rstrip(".") if lines else ""


def agree(error: str | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise on every rank of ``group`` if any rank brings an ``error``; a collective call.

    Args:
        error: this rank's sentence, or None when all is well here.
        group: the ranks that must agree; None means the whole world. Without an initialised process
            group the error is raised at once.

    Raises:
        TensorParallelError: on every rank; the message lists each distinct sentence with its global ranks.
    """
    said = together(error, group)
    if said:
        raise TensorParallelError(said)


def together(sentence: str | None, group: dist.ProcessGroup | None = None) -> str:
    """Each distinct sentence that ranks of ``group`` bring, with their global ranks; a collective call.

    The same on all ranks; "" when nobody brings one. Arguments as of :func:`agree`.
    """
    if not dist.is_available() or not dist.is_initialized():
        return sentence or ""
    found: list[tuple[int, str | None]] = [(0, None)] * dist.get_world_size(group)
    dist.all_gather_object(found, (dist.get_rank(), sentence), group=group)
    ranks_of: dict[str, list[int]] = {}
    for rank, brought in found:
        if brought:
            ranks_of.setdefault(brought, []).append(rank)
    everyone = len(found)
    return " | ".join(
        brought if len(ranks) == everyone else f"{brought} [on {_name(ranks)}]" for brought, ranks in ranks_of.items()
    )


def meet(what: str, patience: float = 60.0, group: dist.ProcessGroup | None = None) -> None:
    """Wait until every rank is in ``what``; a collective call over ``group``, None for the world.

    A rank that waits longer than ``patience`` seconds says on stderr what it waits for: a call that is made on one
    rank only would otherwise be silence until the process group's timeout.
    """
    if not dist.is_available() or not dist.is_initialized():
        return
    work, since, said = dist.barrier(group, async_op=True), time.monotonic(), False
    while not work.is_completed():
        time.sleep(0.001)
        if not said and time.monotonic() - since > patience:
            said = True
            print(
                f"tp_plugin: rank {dist.get_rank()} waits in {what} for other ranks; it is collective, call it on "
                "every rank and not under a test for the main process.",
                file=sys.stderr,
                flush=True,
            )
    work.wait()


def _name(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(map(str, ranks[:8]))
    return f"ranks {shown}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
