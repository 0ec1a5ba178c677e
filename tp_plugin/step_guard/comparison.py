"""Compare one training step run several times: sharded and unsharded, in single precision and as it trains.

All ranks make every run together, since reading a parameter of the unsharded view is a collective. So the ranks tell
each other their findings before the next run.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tp_plugin import log
from tp_plugin.collectives import all_reduce_
from tp_plugin.errors import TensorParallelError, agree, together
from tp_plugin.layers.generators import same_draws
from tp_plugin.mesh import ParallelMesh, comm_device
from tp_plugin.peers import arrive
from tp_plugin.sharding.hooks import SHARE
from tp_plugin.step_guard import fp32_rerun
from tp_plugin.step_guard.differences import (
    TRAINERS_LOSS,
    Outputs,
    described,
    first_layer_apart,
    first_mismatch,
    layer_norms,
    named_tensors,
    sample,
)
from tp_plugin.step_guard.foreign_collectives import without_peers
from tp_plugin.step_guard.param_view import CollectiveReads, PeerFailedError
from tp_plugin.step_guard.reachable_state import StateSnapshot
from tp_plugin.step_guard.sample_batch import copied, rows_of, sample_batch
from tp_plugin.step_guard.unsharded_view import (
    STANDS_FOR,
    RunsShardedError,
    sharded_runs_refused,
    stand_in,
    unsharded_view,
)
from tp_plugin.weights.gather import between_steps

Run = Callable[..., Any]
"""Runs a model on a batch as the trainer or the loop does: (model, batch) -> its loss or its output."""
Group = dist.ProcessGroup | None


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of a comparison.

    Attributes:
        error: this rank's sentence that refuses training; None if it found nothing wrong.
        compared: description of what was compared; empty if nothing was.
    """

    error: str | None = None
    compared: str = ""


@dataclasses.dataclass(frozen=True)
class Mode:
    """Choices of one run.

    Attributes:
        sharded: the sharded models take part, else their unsharded views.
        exact: in single precision.
        plain_kernels: PyTorch's own kernels replace custom ones, which may need half precision.
    """

    sharded: bool
    exact: bool
    plain_kernels: bool = False

    def but(self, **changes: bool) -> Mode:
        """This mode with other values of some attributes."""
        return dataclasses.replace(self, **changes)


AS_TRAINED = Mode(sharded=True, exact=False)


class StepComparison:
    """Compares ``run`` of sharded models with ``run`` of their unsharded views.

    Args:
        models: those that take part; the first one is trained.
        wrappers: the object by which the caller knows each, such as an engine; the model itself where there is none.
        group: the ranks that take part; None is the world.
        state: what the runs may change.
    """

    def __init__(
        self,
        run: Run,
        models: Sequence[nn.Module],
        wrappers: Sequence[nn.Module],
        mesh: ParallelMesh,
        group: Group,
        state: StateSnapshot,
    ) -> None:
        self.run, self.models, self.wrappers, self.mesh, self.group = run, models, wrappers, mesh, group
        self.state, self.rounded = state, fp32_rerun.rounds(models[0])
        self.sample: Mapping[str, Any] = {}
        self.collecting: list[str] = []  # descriptions of wrong collectives in the loss
        self.share: str | None = None  # the last run's error about a shape, if a shard explains it

    def compare(self, batch: Mapping[str, Any]) -> Result:
        """Compare on a sample of ``batch``; a collective call over the group. Logs what could not be compared."""
        self.sample = sample_batch(batch)
        trained, failure = self._try(AS_TRAINED)
        if trained is None:  # not every batch can be sampled
            self.sample = dict(batch)
            trained, failure = self._try(AS_TRAINED)
        if trained is None:
            share, reason = self.share, failure
            if self._any(share is not None) and self._try(AS_TRAINED.but(sharded=False))[0] is not None:
                return Result(None if share is None else f"{share} ({reason}).")
            warn_unchecked(reason, self.group)
            return Result()
        ours, reference, mode, failure = self._run_exact(trained)
        if reference is None:
            mode = AS_TRAINED
            reference = self._try(mode.but(sharded=False))[0] if self.rounded else None
            warn_unchecked(failure, self.group, "was not checked" if reference is None else "was checked coarsely")
            if reference is None:
                return Result()
            ours = trained
        exact, found = mode.exact, first_mismatch(ours, reference, coarse=not mode.exact)
        if not self._any(found is not None) and mode.exact and self.rounded:
            mode = AS_TRAINED
            found = self._compare_coarsely(trained, reference)
        if self._any(found is not None):
            return self._refusal(found, reference, mode, exact)
        return Result(compared=described(ours, reference, rows_of(self.sample), rows_of(batch)))

    def _run_exact(self, trained: Outputs) -> tuple[Outputs, Outputs | None, Mode, str]:
        """Run both in single precision; custom kernels are replaced only if they fail at it.

        Returns:
            The sharded run, the unsharded one, their mode, and the failure if there is no unsharded one.
        """
        names = list(fp32_rerun.custom_functions(self.models))
        failure = ""
        for plain_kernels in (False, True):
            if (plain_kernels and not names) or (not plain_kernels and any(map(fp32_rerun.is_half_only, names))):
                continue
            mode = Mode(sharded=True, exact=True, plain_kernels=plain_kernels)
            reference, failed = self._try(mode.but(sharded=False))
            failure = failed if reference is None else failure
            ours: Outputs | None = trained
            if reference is not None and (self.rounded or plain_kernels):
                ours, failed = self._try(mode)
                failure = failed if ours is None else failure
            if reference is not None and ours is not None:
                return ours, reference, mode, ""
        return trained, None, AS_TRAINED, failure

    def _compare_coarsely(self, trained: Outputs, reference: Outputs) -> str | None:
        """Compare the step as it trains with the unsharded one in single precision."""
        found = first_mismatch(trained, reference, coarse=True)
        if not self._any(found is not None):
            return None
        rounded, _ = self._try(AS_TRAINED.but(sharded=False))  # with its own kernels
        return found if rounded is None else first_mismatch(trained, rounded, coarse=True)

    def _refusal(self, found: str | None, reference: Outputs, mode: Mode, exact: bool) -> Result:
        """Refuse training, if the unsharded run gives the same when it is repeated."""
        again, _ = self._try(mode.but(sharded=False, exact=exact))
        moved = None if again is None else first_mismatch(again, reference, coarse=not exact)
        if self._any(moved is not None):
            reason = None if moved is None else f"computed twice in the same way it is another, {moved}"
            warn_unchecked(reason, self.group)
            return Result()
        cause = self._custom_function_at_fault(mode) or "".join(self.collecting[:1])
        cause = cause or (
            "if the loss reads weights of sharded modules by itself let it use the model's outputs, else please report "
            "it (guard: false in the tp_plugin block trains regardless)"
        )
        layer = self._first_layer(mode)
        if found is None:
            return Result()
        return Result(
            f"the first step computed again without tensor parallelism differs: {found}"
            f"{f', first in {layer}' if layer else ''}, so training is refused: {cause}."
        )

    def _custom_function_at_fault(self, mode: Mode) -> str:
        """A clause naming the custom function without which both runs agree; empty if there is none."""
        names = list(fp32_rerun.custom_functions(self.models))
        if not self._any(bool(names)) or mode.plain_kernels or not mode.exact:
            return ""
        mode = Mode(sharded=True, exact=True, plain_kernels=True)
        ours, _ = self._try(mode)
        reference, _ = self._try(mode.but(sharded=False))
        if ours is None or reference is None or self._any(first_mismatch(ours, reference) is not None):
            return ""
        return (
            f"without the attention function {names[0]!r} both agree: it is called with a rank's heads only, so one "
            "that counts or numbers heads must ask tp_plugin.attention_heads for the model's"
        )

    def _any(self, here: bool) -> bool:
        """Return True if any rank of the group passes True; a collective call."""
        group = self.group or dist.group.WORLD
        flag = torch.tensor([here], dtype=torch.int32, device=comm_device(group))
        all_reduce_(flag, group, op=dist.ReduceOp.MAX, purpose="guard")
        return bool(flag)

    def _try(self, mode: Mode) -> tuple[Outputs | None, str]:
        """Run once; returns the outputs, None on all ranks if any rank failed, and this rank's failure."""
        found, failure, refusal, self.share = None, "", None, None
        raised: Exception | None = None
        try:
            found = self._outputs(mode)
        except TensorParallelError as ours:
            refusal, raised = str(ours), ours
        except (PeerFailedError, RunsShardedError) as known:  # of a peer's failure the peer says why
            failure, raised = str(known) if isinstance(known, RunsShardedError) else "", known
        except Exception as other:  # too little memory among them, perhaps on this rank alone
            failure, self.share, raised = f"{type(other).__name__}: {other}", getattr(other, SHARE, None), other
        arrive(raised, "the check of the first step", self.group)
        agree(refusal, self.group)
        return (None if self._any(found is None) else found), failure

    def _outputs(self, mode: Mode, norms: dict[str, float] | None = None) -> Outputs:
        """Run once; keep nothing for a backward pass and undo what the run changed. Fills ``norms`` of its layers."""
        outputs: Outputs = {}
        calls = 0

        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            nonlocal calls
            calls += 1
            for name, value in named_tensors(output):
                outputs[f"{name} of forward {calls}" if calls > 1 else name] = sample(value)

        with contextlib.ExitStack() as stack:
            stack.enter_context(same_draws(next(self.models[0].parameters()).device))
            stack.callback(self.state.put_back)
            if mode.exact:
                stack.enter_context(fp32_rerun.in_single_precision(self.models, plain_kernels=mode.plain_kernels))
            taking_part = self._taking_part(mode, stack)
            by: dict[int, Any] = {}
            for model, wrapper, part in zip(self.models, self.wrappers, taking_part, strict=True):
                by |= {} if mode.sharded else vars(part)[STANDS_FOR]
                by |= {} if wrapper is model else {id(wrapper): stand_in(wrapper, part)}
            self.state.replace(by)
            stack.callback(taking_part[0].register_forward_hook(note).remove)
            if norms is not None:
                stack.enter_context(layer_norms(taking_part[0], norms))
            value = self.run(by.get(id(self.wrappers[0]), taking_part[0]), copied(self.sample))
        # beside the model's outputs, which may have a loss too: a trainer may add terms of its own to that
        name, loss = (
            (TRAINERS_LOSS, value) if isinstance(value, torch.Tensor) else ("loss", getattr(value, "loss", None))
        )
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            return {name: loss.detach().float().reshape(())} | outputs
        return outputs

    def _taking_part(self, mode: Mode, stack: contextlib.ExitStack) -> list[nn.Module]:
        dtype = torch.float32 if mode.exact and self.rounded else None
        if mode.sharded:
            stack.enter_context(fp32_rerun.nothing_kept(self.models))
            if dtype is not None:
                stack.enter_context(fp32_rerun.widened(self.models, dtype))
            return list(self.models)
        # ZeRO-3 prefetches in a forward of the sharded model; nothing may be under way when a view is read
        for model in self.models:
            stack.enter_context(between_steps(model))
        stack.enter_context(torch.no_grad())
        self.collecting = stack.enter_context(without_peers(self.mesh))
        reads = stack.enter_context(CollectiveReads(self.models, self.mesh))
        views = [unsharded_view(model, self.mesh, dtype, reads) for model in self.models]
        stack.enter_context(sharded_runs_refused(self.models))
        return views

    def _first_layer(self, mode: Mode) -> str:
        """Name the first layer whose output's norm differs."""
        norms: tuple[dict[str, float], dict[str, float]] = {}, {}
        for sharded, found in zip((True, False), norms, strict=True):
            self._outputs(mode.but(sharded=sharded), found)
        return first_layer_apart(*norms)


def warn_unchecked(reason: str | None, group: Group, how: str = "was not checked") -> None:
    """Warn once, whichever rank failed; a collective call over ``group``."""
    reason = together(reason, group)
    if dist.get_rank(group) == 0:
        log.warning(
            f"the first step could not be computed again without tensor parallelism ({reason}); its loss {how}.",
            rank0_only=False,
        )
