"""The first step, computed again without us: the guard that refuses to train on a wrong loss.

A piece of the batch goes through the sharded model and through its plain twin, both in evaluation mode, from the same
random state and in single precision: what differs between them is tensor parallelism, and nothing else. Losses are
those of whoever trains (a trainer's ``compute_loss``, the model's own), so code that reads a shard for a weight is
caught too. Where training rounds to half precision the sharded model is also run as it trains, and compared coarsely.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tp_plugin.collectives import all_reduce_
from tp_plugin.errors import NO_FULLGRAPH, TensorParallelError, agree, together
from tp_plugin.sharding import Sharding
from tp_plugin.sharding.equal import comm_device
from tp_plugin.sharding.inputs import ATTRIBUTE as INPUTS
from tp_plugin.sharding.inputs import InputGuard, broadcast_over_replicas
from tp_plugin.verify.cut import copied, cut, is_plain
from tp_plugin.verify.differences import TRAINERS_LOSS, Seen, difference, first_apart, named_tensors, note_norms, sample
from tp_plugin.verify.exact import exactly, nothing_kept, rounds, widened
from tp_plugin.verify.gradients import GradientWatch
from tp_plugin.verify.replicas import is_turn, require_equal_replicas
from tp_plugin.verify.trunk import trunk_of
from tp_plugin.verify.twin import plain_twin
from tp_plugin.weights.stream import between_steps

ATTRIBUTE = "tp_guard"

Run = Callable[..., Any]
"""Runs a model on a batch, as whoever trains does: (model, batch, what stands for the models beside it) -> its loss or
its output."""


class StepGuard:
    """Watches one sharded model: see the module's docstring, and :mod:`gradients <tp_plugin.verify.gradients>` and
    :mod:`replicas <tp_plugin.verify.replicas>` for what else is checked when.

    Attributes:
        due: the next forward is examined, by mode (True: training).
        replicas_due: replicas are compared at the next training forward, whenever that is; set by whoever loads.
    """

    def __init__(self, model: nn.Module, record: Sharding) -> None:
        self.model, self.mesh, self.config = model, record.mesh, record.config
        self.due = {True: self.config.guard, False: self.config.guard}
        self.gradients: GradientWatch | None = GradientWatch(model) if self.config.guard else None
        self.forwards, self.replicas_due, self._said, self._wholes = 0, False, False, 0
        self.inputs: InputGuard = model.__dict__[INPUTS]
        self.inputs.then.append(self._before_forward)
        trunk_of(model).register_forward_pre_hook(self._before_trunk)
        model.__dict__[ATTRIBUTE] = self

    def request(self) -> None:
        """Check everything again at the next training step."""
        self.due[True] = self.replicas_due = True
        if self.gradients is None:
            self.gradients = GradientWatch(self.model)

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        training = model.training and torch.is_grad_enabled()
        if training:
            self._wholes += 1
            self._before_training()
        if self.due[training] and model.training == training:
            if not training and not self.due[True]:
                self.due[False] = False  # its training has been examined
            elif is_plain((args, kwargs)):
                self.examine(lambda m, batch: m(*batch["args"], **batch["kwargs"]), {"args": args, "kwargs": kwargs})
            elif training:
                self.due[True] = False
                self._say_unchecked("inputs that are no tensors, such as a cache, would be spoilt", None)

    @torch.compiler.disable(reason=NO_FULLGRAPH)
    def _before_trunk(self, trunk: nn.Module, _args: tuple) -> None:
        """Loops may run the model without its head, and never the whole model: no loss can be computed again then."""
        again = torch._C._current_graph_task_id() != -1  # a recomputation
        if not trunk.training or not torch.is_grad_enabled() or again or self.inputs.paused:
            return
        if self._wholes or trunk is self.model:
            self._wholes = 0  # it was called by the whole model
            return
        self._before_training()
        if self.due[True] and not self._said:
            self._said = True
            self._say_unchecked("the loss is made of a part of the model, whose own forward is not called", None)

    def _before_training(self) -> None:
        every = self.config.check_replicas_every
        if self.replicas_due or is_turn(self.forwards, every):
            early = not self.replicas_due and self.forwards % every != 0
            require_equal_replicas(self.model, self.mesh, partitioned=not early)
        self.replicas_due = False
        self.forwards += 1
        if self.gradients is not None and self.gradients.complete():
            self.gradients.stop()
            agree(self.gradients.missing())
            self.gradients.compare(self.mesh)
            self.gradients = None
        elif self.gradients is not None:
            self.gradients.start()

    @torch.compiler.disable(reason=NO_FULLGRAPH)
    def examine(
        self, run: Run, batch: Mapping[str, Any], root: nn.Module | None = None, beside: Sequence[nn.Module] = ()
    ) -> None:
        """Run a piece of ``batch`` sharded and plain and compare; a collective call, over the world in training.

        Args:
            root: what ``run`` is given: the model, or a wrapper around it (a PeftModel); None is the model.
            beside: other sharded models that take part, such as DPO's reference; ``run`` is given them, or their
                twins, after the batch.

        Raises:
            TensorParallelError: on every rank: loss or outputs differ, by how much, and in which layer first.
        """
        training = self.model.training
        self.due[training] = False
        models = [self.model if root is None else root, *beside]
        # evaluation may be run by one replica alone
        group = None if training else self.mesh.tp_group
        if training and any(hasattr(param, "ds_id") for model in models for param in model.parameters()):
            # parameters are gathered over the replicas too, which must then read the same of them
            batch = broadcast_over_replicas(dict(batch), self.mesh)
        with self._apart(models):
            error = self._examined(run, batch, models, group)
        agree(error, group)

    def _say_unchecked(self, reason: str, group: dist.ProcessGroup | None, how: str = "was not checked") -> None:
        """Said once, whichever rank failed; a collective call."""
        reason = together(reason, group)
        if dist.get_rank(group) == 0:
            print(
                f"tp_plugin: WARNING: the first step could not be computed again without tensor parallelism "
                f"({reason}); its loss {how}.",
                file=sys.stderr,
                flush=True,
            )

    def _examined(
        self, run: Run, batch: Mapping[str, Any], models: list[nn.Module], group: dist.ProcessGroup | None
    ) -> str | None:
        def tried(piece: Mapping[str, Any], *, sharded: bool, exact: bool) -> tuple[Seen | None, str]:
            """What a run gives on all ranks, or None, and what it raised on this one."""
            found, failure, refusal = None, "", None
            try:
                found = self._seen(run, piece, models, sharded=sharded, exact=exact)
            except TensorParallelError as ours:
                refusal = str(ours)
            except Exception as other:  # too little memory among them: pieces are alike, and so it is on all ranks
                failure = f"{type(other).__name__}: {other}"
            agree(refusal, group)
            return (None if self._any(found is None, group) else found), failure

        rounded, piece = rounds(self.model), cut(batch)
        trained, failure = tried(piece, sharded=True, exact=False)
        if trained is None:  # not every batch can be cut
            piece = dict(batch)
            trained, failure = tried(piece, sharded=True, exact=False)
        if trained is None:
            self._say_unchecked(failure, group)
            return None
        plain, failure = tried(piece, sharded=False, exact=True)
        ours = trained
        if plain is not None and rounded:
            wide, failure = tried(piece, sharded=True, exact=True)
            ours, plain = (wide, plain) if wide is not None else (trained, None)
        exact = plain is not None
        if plain is None:
            if rounded:
                plain, _ = tried(piece, sharded=False, exact=False)
            self._say_unchecked(failure, group, "was not checked" if plain is None else "was checked coarsely")
            if plain is None:
                return None
        found = difference(ours, plain, coarse=not exact)
        if exact and rounded:
            found = found or difference(trained, plain, coarse=True)
        if not self._any(found is not None, group):
            return None
        where = self._where(run, piece, models, exact=exact)
        if found is None:
            return None
        return (
            f"the first step computed again without tensor parallelism differs: {found}"
            f"{f', first in {where}' if where else ''}; training would go wrong, so it is not begun; if the loss reads "
            "weights of sharded modules by itself let it use the model's outputs, else please report it (guard: false "
            "in the tp_plugin block trains regardless)."
        )

    def _any(self, here: bool, group: dist.ProcessGroup | None) -> bool:
        """Whether it is so on any rank that takes part; a collective call."""
        group = dist.group.WORLD if group is None else group
        flag = torch.tensor([here], dtype=torch.int32, device=comm_device(group))
        all_reduce_(flag, group, op=dist.ReduceOp.MAX, purpose="guard")
        return bool(flag)

    def _seen(
        self,
        run: Run,
        batch: Mapping[str, Any],
        models: list[nn.Module],
        *,
        sharded: bool,
        exact: bool,
        watch: Callable[[nn.Module], Callable[[], object]] | None = None,
    ) -> Seen:
        """What one run gives; nothing is kept for a backward pass."""
        outputs: Seen = {}
        calls = 0

        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            nonlocal calls
            calls += 1
            for name, value in named_tensors(output):
                outputs[f"{name} of forward {calls}" if calls > 1 else name] = sample(value)

        wide = torch.float32 if exact and rounds(self.model) else None
        with contextlib.ExitStack() as stack:
            stack.enter_context(same_draws(self.model))
            if exact:
                stack.enter_context(exactly(models))
            if sharded:
                stack.enter_context(nothing_kept())
                if wide is not None:
                    stack.enter_context(widened(models, wide))
                taking_part = models
            else:
                # ZeRO-3 fetches ahead in a forward of the sharded model; nothing may be under way when a twin reads
                for model in models:
                    stack.enter_context(between_steps(model))
                stack.enter_context(torch.no_grad())
                taking_part = [plain_twin(model, self.mesh, wide) for model in models]
            stack.callback(taking_part[0].register_forward_hook(note).remove)
            if watch is not None:
                stack.callback(watch(taking_part[0]))
            value = run(taking_part[0], copied(batch), *taking_part[1:])
        # beside what the model gave, which may have a loss too: to that a trainer may add terms of its own
        name, loss = (
            (TRAINERS_LOSS, value) if isinstance(value, torch.Tensor) else ("loss", getattr(value, "loss", None))
        )
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            return {name: loss.detach().float().reshape(())} | outputs
        return outputs

    def _where(self, run: Run, batch: Mapping[str, Any], models: list[nn.Module], *, exact: bool) -> str:
        """The first layer (an entry of a list of modules, or a child of the model) whose output's norm differs."""
        norms: list[dict[str, float]] = []

        def watch(model: nn.Module) -> Callable[[], object]:
            norms.append({})
            return note_norms(model, norms[-1])

        for sharded in (True, False):
            self._seen(run, batch, models, sharded=sharded, exact=exact, watch=watch)
        return first_apart(*norms)

    @contextlib.contextmanager
    def _apart(self, models: list[nn.Module]) -> Iterator[None]:
        """Forwards that leave no trace: evaluation mode, nothing counted, nothing compiled."""
        modules = [module for model in models for module in model.modules()]
        modes = [(module, module.training) for module in modules]
        compiled = [(m, m._compiled_call_impl) for m in modules if m._compiled_call_impl is not None]
        counting = [self.gradients, *(vars(module).get(INPUTS) for module in modules)]
        watching = [one for one in counting if one is not None]
        for module, _ in compiled:
            module._compiled_call_impl = None
        for one in watching:
            one.paused = True
        for model in models:
            model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for module, call in compiled:
                module._compiled_call_impl = call
            for one in watching:
                one.paused = False


def same_draws(model: nn.Module) -> contextlib.AbstractContextManager:
    """Random generators are afterwards what they were."""
    device = next(model.parameters()).device
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def guard_of(model: Any) -> StepGuard | None:
    """The guard of a sharded model, or of the sharded model inside a wrapper; None if there is none."""
    if not isinstance(model, nn.Module):
        return None
    return next((m.__dict__[ATTRIBUTE] for m in model.modules() if ATTRIBUTE in m.__dict__), None)
