"""Errors that every rank raises together.

A rank that raises alone leaves its peers waiting in the next collective until a timeout ends them.
So conditions that can differ between ranks go through :func:`agree`, which raises on all ranks or on none.
"""

from __future__ import annotations

import contextlib
import contextvars
import pickle
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from tp_plugin import log

NO_FULLGRAPH = "a tensor-parallel model breaks graphs at its collectives: compile without fullgraph=True"
"""The reason that torch.compile shows where this package opts out of it."""


class TensorParallelError(ValueError):
    """A tensor-parallel setup that would train wrongly or cannot work. The message names the fix."""


def sentence_of(failure: Exception) -> str:
    """The failure in one sentence without its full stop: our own message, else the type and first sentence."""
    if isinstance(failure, TensorParallelError):
        return str(failure)
    return f"{type(failure).__name__}: {reason_of(failure) or 'no reason given'}"


def reason_of(failure: Exception) -> str:
    """The first sentence of a library's error message; "" if it is empty."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return lines[0].split(". ")[0].rstrip(".") if lines else ""


def agree(error: str | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise on every rank of ``group`` if any rank has an ``error``; a collective call.

    Args:
        error: this rank's sentence, or None without an error.
        group: the ranks that must agree; None means the whole world. Without an initialised process
            group the error is raised at once.

    Raises:
        TensorParallelError: on every rank; the message lists each distinct sentence with its global ranks.
    """
    said = together(error, group)
    if said:
        raise TensorParallelError(said)


def together(sentence: str | None, group: dist.ProcessGroup | None = None) -> str:
    """Each distinct sentence of the ranks of ``group``, with their global ranks; a collective call.

    The same on all ranks; "" if no rank has one. Arguments as of :func:`agree`.
    """
    if not dist.is_available() or not dist.is_initialized():
        return sentence or ""
    found: list[tuple[int, str | None]] = [(0, None)] * dist.get_world_size(group)
    dist.all_gather_object(found, (dist.get_rank(), sentence), group=group)
    ranks_of: dict[str, list[int]] = {}
    for rank, said in found:
        if said:
            ranks_of.setdefault(said, []).append(rank)
    world = len(found)
    return " | ".join(
        said if len(ranks) == world else f"{said} [on {_name(ranks)}]" for said, ranks in ranks_of.items()
    )


_SHARED: contextvars.ContextVar[list[Exception] | None] = contextvars.ContextVar(
    "failures known to all ranks", default=None
)
"""Failures that all ranks know of, since the outermost open :func:`failing_together` began; None outside of all."""


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Raise an exception of the body on every rank of the world, at the body's end; a collective call.

    For work of rank 0 alone: a caller that catches its failure would continue there, and the other ranks would wait
    for rank 0 in their next collective. Ranks without a failure raise the same exception if it can be pickled. The
    body may contain collectives only where no rank can fail alone before them, or where ranks fail together too.

    Raises:
        TensorParallelError: instead of an exception that cannot be pickled, on every rank that has none of its own.
    """
    failure: Any = None
    outer = _SHARED.get()
    known_failures: list[Exception] = [] if outer is None else outer
    token = _SHARED.set(known_failures)
    try:
        yield
    except Exception as raised:
        failure = raised
    finally:
        _SHARED.reset(token)
    known = any(failure is one for one in known_failures)  # by a region inside this one
    if known or not dist.is_available() or not dist.is_initialized():
        if failure is not None:
            raise failure
        return
    mine = None if failure is None else (dist.get_rank(), sentence_of(failure), _pickled(failure))
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    failed = [one for one in found if one is not None]
    if not failed:
        return
    rank, sentence, data = failed[0]
    shared: Any = failure
    if data is None and len(failed) < len(found):
        shared = TensorParallelError(f"{sentence} [on rank {rank}]")
    elif shared is None:
        shared = pickle.loads(data)
        add_note(shared, f"raised on rank {rank}")
    known_failures.append(shared)
    if shared is failure:
        raise shared
    raise shared from failure


def add_note(failure: BaseException, text: str) -> None:
    """Show ``text`` under the message of an exception."""
    if sys.version_info >= (3, 11):
        failure.add_note(text)
    elif failure.args and isinstance(failure.args[0], str):
        failure.args = (f"{failure.args[0]}\n{text}", *failure.args[1:])


def _pickled(failure: Exception) -> bytes | None:
    """The exception as bytes; None if unpickling does not give an equal one."""
    try:
        data = pickle.dumps(failure)
        made = pickle.loads(data)
    except Exception:  # exceptions with arguments of their own often cannot be pickled
        return None
    return data if type(made) is type(failure) and str(made) == str(failure) else None


def meet(what: str, patience: float = 60.0, group: dist.ProcessGroup | None = None) -> None:
    """Wait until every rank is in ``what``; a collective call over ``group``, None for the world.

    A rank that waits longer than ``patience`` seconds logs the name of the call. Without it, a call on one rank only
    would give no output until the process group's timeout.
    """
    if not dist.is_available() or not dist.is_initialized():
        return
    work, since, said = dist.barrier(group, async_op=True), time.monotonic(), False
    while not work.is_completed():
        time.sleep(0.001)
        if not said and time.monotonic() - since > patience:
            said = True
            log.warning(
                f"rank {dist.get_rank()} waits in {what} for other ranks; it is collective. Call it on every rank, "
                "not under a test for the main process, nor after a failure that one rank has caught.",
                rank0_only=False,
            )
    work.wait()


def _name(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(map(str, ranks[:8]))
    return f"ranks {shown}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
