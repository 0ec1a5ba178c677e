"""Full tensors as they come, bucket by bucket, on the one rank that wants them.

Nothing is gathered where nobody needs it: the ranks of one TP group send their shards to its writer, and other data-
parallel replicas do nothing, or serve a writer of their own. Under ZeRO-3 a bucket's parameters are first made whole
over their data-parallel group, which every rank takes part in. Beyond its shard a rank holds a few buckets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tp_plugin.collectives import all_reduce_, gather_to
from tp_plugin.errors import TensorParallelError, agree, sentence_of
from tp_plugin.mesh import ParallelMesh
from tp_plugin.sharding.equal import comm_device
from tp_plugin.weights.parcel import Parcel, Span, pack, sharded_layout, unpack

BUCKET = 128 << 20  # bytes of full tensors gathered at a time
_ENGINE = "tp_engine"


@dataclasses.dataclass(frozen=True)
class View:
    """Elements of one source tensor as ``torch.as_strided`` names them."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclasses.dataclass(frozen=True)
class Output:
    """A tensor to be written.

    Attributes:
        name: under which it is written.
        sources: names, in the model, of what it is made of.
        view: which elements of its only source it is; None when it is computed from all of ``sources``.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    view: View | None


Sink = Callable[[Output, torch.Tensor, int], None]
"""Takes an output's elements from a place on: (output, CPU tensor, index of its first element)."""
Compute = Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]
"""Makes outputs by name of full source tensors by name."""


def persistent(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers under every name they have; the very objects, not detached copies."""
    return dict(model.state_dict(keep_vars=True))


def full_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Shape of the unsharded tensor, whatever TP and ZeRO-3 have done to this one."""
    layout = sharded_layout(tensor)
    return layout.shape if layout is not None else tuple(getattr(tensor, "ds_shape", tensor.shape))


def identities(tensors: Mapping[str, torch.Tensor]) -> list[Output]:
    """Each tensor as an output, under its own name; one of several names of a tied tensor is enough."""
    seen: dict[int, str] = {}
    for name, tensor in tensors.items():
        seen.setdefault(id(tensor), name)
    return [
        Output(name, tensor.dtype, full_shape(tensor), (name,), _whole(full_shape(tensor)))
        for name, tensor in tensors.items()
        if seen[id(tensor)] == name
    ]


def stream(
    tensors: Mapping[str, torch.Tensor],
    outputs: Sequence[Output],
    mesh: ParallelMesh,
    *,
    replica: int,
    writer: int,
    sink: Sink,
    compute: Compute | None = None,
    bucket: int | None = None,
) -> None:
    """Hand ``outputs`` to ``sink`` on TP rank ``writer`` of data-parallel replica ``replica``, in order.

    A collective call over that replica's TP group; over the world where a parameter is partitioned by ZeRO-3.

    Args:
        tensors: name -> this rank's tensor, as of :func:`persistent`.
        outputs: what to make; the same on all ranks.
        compute: makes the outputs that are no view of one source.
        bucket: bytes of full tensors gathered at a time, None for :data:`BUCKET`; an output that is no
            run of rows may exceed it.

    Raises:
        TensorParallelError: on every rank of the TP group, when one of them failed before a bucket was exchanged; no
            rank waits for one that has failed, and none goes on gathering.
        Exception: whatever else failed, on this rank alone.
    """
    mine, made_whole = mesh.dp_rank == replica, _MadeWhole()
    failure: Exception | None = None
    failed_somewhere = False
    flag = torch.zeros(1, dtype=torch.int32, device=comm_device(mesh.tp_group))
    with made_whole:
        for steps in _buckets(tensors, outputs, bucket or BUCKET):
            spans = list(dict.fromkeys(span for step in steps for span in step.spans))
            made_whole.change_to([tensors[name] for name in dict.fromkeys(span.name for span in spans)])
            if not mine or failed_somewhere:
                continue
            parcel: Parcel | None = None
            found: dict[Span, torch.Tensor] | None = None
            try:
                if failure is None:
                    parcel = pack(tensors, spans, mesh, writer)
            except Exception as failed:  # raised when the other ranks no longer wait for this one
                failure = failed
            if any(sharded_layout(tensors[span.name]) is not None for span in spans):
                failed_somewhere = _anywhere(failure is not None, flag, mesh)
                if failed_somewhere:
                    continue
                assert parcel is not None
                gather_to(parcel.packed, mesh.tp_group, writer, parcel.received, purpose="export")
            try:
                if parcel is not None and mesh.tp_rank == writer:
                    found = unpack(tensors, spans, parcel)
                    parcel = None  # let go of what was received
                    _hand_over(tensors, steps, found, sink, compute)
            except Exception as failed:
                failure = failed
            parcel = found = None
    if failed_somewhere:
        try:
            agree(None if failure is None else sentence_of(failure), mesh.tp_group)
        except TensorParallelError as together:
            raise together from failure
    if failure is not None:
        raise failure


def _anywhere(failed: bool, flag: torch.Tensor, mesh: ParallelMesh) -> bool:
    """Whether a rank of the TP group has failed: one number a bucket, so that nobody waits for its shards."""
    if mesh.tp_group is None:
        return failed
    flag.fill_(int(failed))
    all_reduce_(flag, mesh.tp_group, op=dist.ReduceOp.MAX, purpose="export")
    return bool(flag.item())


def _hand_over(
    tensors: Mapping[str, torch.Tensor],
    steps: Sequence[_Step],
    found: Mapping[Span, torch.Tensor],
    sink: Sink,
    compute: Compute | None,
) -> None:
    made: dict[tuple[str, ...], Mapping[str, torch.Tensor]] = {}
    for step in steps:
        output, view = step.output, step.output.view
        if view is None:
            if compute is None:
                raise ValueError(f"{output.name!r} has to be computed and nothing was given to compute it")
            if output.sources not in made:
                made[output.sources] = compute({span.name: found[span] for span in step.spans})
            sink(output, made[output.sources][output.name], 0)
        elif step.whole_rows:
            sink(output, found[step.spans[0]].reshape(-1), step.spans[0].start * _row(output.shape))
        else:
            rows = found[step.spans[0]]
            first = step.spans[0].start * _row(full_shape(tensors[output.sources[0]]))
            sink(output, rows.as_strided(view.size, view.stride, view.offset - first).contiguous(), 0)


class _MadeWhole(contextlib.ExitStack):
    """The parameters of the bucket at hand, whole over their data-parallel group where ZeRO-3 holds them in parts."""

    _now: tuple[int, ...] = ()

    def change_to(self, tensors: Sequence[torch.Tensor]) -> None:
        parted = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
        ids = tuple(map(id, parted))
        if ids == self._now:  # a large parameter is more than one bucket
            return
        self.close()
        self._now = ids
        if parted:
            import deepspeed

            self.enter_context(deepspeed.zero.GatheredParameters(parted))


@dataclasses.dataclass(frozen=True)
class _Step:
    output: Output
    spans: tuple[Span, ...]
    whole_rows: bool
    nbytes: int


def _buckets(tensors: Mapping[str, torch.Tensor], outputs: Sequence[Output], limit: int) -> Iterator[list[_Step]]:
    steps: list[_Step] = []
    known: set[Span] = set()
    held = 0
    for step in _steps(tensors, outputs, limit):
        new = 0 if known.issuperset(step.spans) else step.nbytes
        if steps and held + new > limit:
            yield steps
            steps, known, held, new = [], set(), 0, step.nbytes
        steps.append(step)
        known.update(step.spans)
        held += new
    if steps:
        yield steps


def _steps(tensors: Mapping[str, torch.Tensor], outputs: Sequence[Output], limit: int) -> Iterator[_Step]:
    for output in outputs:
        view, shapes = output.view, [full_shape(tensors[name]) for name in output.sources]
        if view is None:
            spans = tuple(Span(n, 0, _rows(shape)) for n, shape in zip(output.sources, shapes, strict=True))
            total = sum(math.prod(s) * tensors[n].dtype.itemsize for n, s in zip(output.sources, shapes, strict=True))
            yield _Step(output, spans, False, total)
            continue
        name, row = output.sources[0], _row(shapes[0])
        if view == _whole(shapes[0]):
            many = max(1, limit // max(1, row * output.dtype.itemsize))
            for start in range(0, _rows(shapes[0]), many):
                span = Span(name, start, min(start + many, _rows(shapes[0])))
                yield _Step(output, (span,), True, (span.stop - span.start) * row * output.dtype.itemsize)
            continue
        last = view.offset + sum((n - 1) * by for n, by in zip(view.size, view.stride, strict=True))
        span = Span(name, view.offset // row, last // row + 1)
        yield _Step(output, (span,), False, (span.stop - span.start) * row * output.dtype.itemsize)


def _rows(shape: Sequence[int]) -> int:
    return shape[0] if shape else 1


def _row(shape: Sequence[int]) -> int:
    return math.prod(shape[1:])


def _whole(shape: tuple[int, ...]) -> View:
    return View(shape, tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))), 0)


def note_engine(model: nn.Module, engine: Any) -> None:
    """Remember, on a sharded model, the engine that trains it; see :func:`between_steps`."""
    model.__dict__[_ENGINE] = weakref.ref(engine)


@contextlib.contextmanager
def between_steps(model_or_engine: Any) -> Iterator[None]:
    """ZeRO-3 releases what it prefetched before parameters are gathered bucket by bucket, and resumes after."""
    engine = model_or_engine
    if not hasattr(engine, "optimizer") and isinstance(engine, nn.Module):
        refs = (vars(module).get(_ENGINE) for module in engine.modules())
        engine = next((ref() for ref in refs if ref is not None), None)
    optimizer: Any = getattr(engine, "optimizer", None)
    if hasattr(optimizer, "checkpoint_event_prologue"):
        optimizer.checkpoint_event_prologue()
    try:
        yield
    finally:
        if hasattr(optimizer, "checkpoint_event_epilogue"):
            optimizer.checkpoint_event_epilogue()
