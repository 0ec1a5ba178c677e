"""Full tensors, gathered bucket by bucket to one rank.

The ranks of one TP group send their shards to its writer. Other data-parallel replicas do nothing, or serve a writer of
their own. Under ZeRO-3 every rank first gathers a bucket's parameters over their data-parallel group. Beyond its shard
a rank holds a few buckets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from tp_plugin.collectives import all_reduce_, gather_to
from tp_plugin.errors import TensorParallelError, agree, sentence_of
from tp_plugin.mesh import ParallelMesh, comm_device
from tp_plugin.param_info import full_shape, sharded_layout
from tp_plugin.partitioned import gathered, is_partitioned
from tp_plugin.weights.gather_buffer import GatherBuffer, Span, pack, unpack

BUCKET = 128 << 20  # bytes of full tensors gathered at a time


@dataclasses.dataclass(frozen=True)
class View:
    """Elements of one source tensor, as in ``torch.as_strided``."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclasses.dataclass(frozen=True)
class Output:
    """A tensor to be written.

    Attributes:
        name: in the file.
        sources: names, in the model, of the tensors it is made of.
        view: elements of its only source; None if it is computed from all of ``sources``.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    view: View | None


Sink = Callable[[Output, torch.Tensor, int], None]
"""Consumes a run of an output's elements: (output, CPU tensor, index of its first element)."""
Compute = Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]
"""Computes outputs by name from full source tensors by name."""


def persistent(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers under all their names, not detached."""
    return dict(model.state_dict(keep_vars=True))


def identities(tensors: Mapping[str, torch.Tensor]) -> list[Output]:
    """An output for each tensor, a tied one under its first name only."""
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
        outputs: the same on all ranks.
        compute: computes the outputs without a view.
        bucket: bytes of full tensors gathered at a time, None for :data:`BUCKET`; an output that is no
            run of rows may exceed it.

    Raises:
        TensorParallelError: on every rank of the TP group, if one of them failed before a bucket was exchanged; all
            ranks stop gathering then.
        Exception: any other failure, on this rank alone.
    """
    exchange = _Exchange(tensors, mesh, writer, sink, compute)
    with _Gathered() as partitioned:
        for steps in _buckets(tensors, outputs, bucket or BUCKET):
            spans = list(dict.fromkeys(span for step in steps for span in step.spans))
            partitioned.change_to([tensors[name] for name in dict.fromkeys(span.name for span in spans)])
            if mesh.dp_rank == replica:
                exchange.send(steps, spans)
    exchange.finish()


class _Exchange:
    """Buckets of one TP group. A rank that fails says so before the next bucket, so that no rank waits for it."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], mesh: ParallelMesh, writer: int, sink: Sink, compute: Compute | None
    ) -> None:
        self.tensors, self.mesh, self.writer, self.sink, self.compute = tensors, mesh, writer, sink, compute
        self.failure: Exception | None = None
        self.failed_somewhere = False
        self._flag = torch.zeros(1, dtype=torch.int32, device=comm_device(mesh.tp_group))

    def send(self, steps: Sequence[_Step], spans: Sequence[Span]) -> None:
        """Gather one bucket to the writer and give it to the sink there."""
        if self.failed_somewhere:
            return
        buffer: GatherBuffer | None = None
        found: dict[Span, torch.Tensor] | None = None
        try:
            if self.failure is None:
                buffer = pack(self.tensors, spans, self.mesh, self.writer)
        except Exception as failed:  # raised by finish(), when no rank waits for this one
            self.failure = failed
        if any(sharded_layout(self.tensors[span.name]) is not None for span in spans):
            self.failed_somewhere = self._any_failed()
            if self.failed_somewhere:
                return
            assert buffer is not None
            gather_to(buffer.packed, self.mesh.tp_group, self.writer, buffer.received, purpose="export")
        try:
            if buffer is not None and self.mesh.tp_rank == self.writer:
                found = unpack(self.tensors, spans, buffer)
                buffer = None  # free the memory of the received shards
                _hand_over(self.tensors, steps, found, self.sink, self.compute)
        except Exception as failed:
            self.failure = failed
        buffer = found = None  # a failure's traceback keeps this frame

    def _any_failed(self) -> bool:
        """Return True if a rank of the TP group has failed; one all-reduce of a number."""
        if self.mesh.tp_group is None:
            return self.failure is not None
        self._flag.fill_(int(self.failure is not None))
        all_reduce_(self._flag, self.mesh.tp_group, op=dist.ReduceOp.MAX, purpose="export")
        return bool(self._flag.item())

    def finish(self) -> None:
        """Raise what failed, on every rank of the TP group if they know of it."""
        if self.failed_somewhere:
            try:
                agree(None if self.failure is None else sentence_of(self.failure), self.mesh.tp_group)
            except TensorParallelError as together:
                raise together from self.failure
        if self.failure is not None:
            raise self.failure


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
                raise ValueError(f"{output.name!r} has no view and stream() was given no function to compute it")
            if output.sources not in made:
                made[output.sources] = compute({span.name: found[span] for span in step.spans})
            sink(output, made[output.sources][output.name], 0)
        elif step.whole_rows:
            sink(output, found[step.spans[0]].reshape(-1), step.spans[0].start * _row(output.shape))
        else:
            rows = found[step.spans[0]]
            first = step.spans[0].start * _row(full_shape(tensors[output.sources[0]]))
            sink(output, rows.as_strided(view.size, view.stride, view.offset - first).contiguous(), 0)


class _Gathered(contextlib.ExitStack):
    """Gathers the current bucket's parameters over their data-parallel group if they are partitioned."""

    _now: tuple[int, ...] = ()

    def change_to(self, tensors: Sequence[torch.Tensor]) -> None:
        params = [tensor for tensor in tensors if is_partitioned(tensor)]
        ids = tuple(map(id, params))
        if ids == self._now:  # a large parameter spans several buckets
            return
        self.close()
        self._now = ids
        if params:
            self.enter_context(gathered(params))


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
