"""The guard of a training step: it refuses to train where tensor parallelism changes the loss.

On a sample of the batch it runs the sharded model and its unsharded view. Both run in evaluation mode, from the same
random state and in single precision, so they differ by tensor parallelism only. Losses are those of the trainer
(``compute_loss``) or the model's own, so code that takes a shard for the full weight is caught too. Where training
rounds to half precision the sharded model also runs as it trains, and is compared coarsely.

Order of a training step under the guard. Every rank of the world makes all of it; "first" is the first step, and the
next one after :meth:`StepGuard.request`:

1. ``Trainer.training_step``, patched by ``integrations/transformers``. First: brings random generators in step,
   compares the batch over the TP group, and calls :meth:`StepGuard.examine` with ``Trainer.compute_loss``.
2. :class:`~tp_plugin.sharding.inputs.InputGuard`, a forward pre-hook of the sharded model. Hands out or compares the
   batch of the TP group, then calls its followers.
3. :meth:`StepGuard._before_forward`, the follower. Compares replicas when it is their turn. Ends the
   :class:`~tp_plugin.step_guard.gradients.GradientWatch` of the step before, or starts it. First, unless a trainer's
   loss was compared: calls :meth:`StepGuard.examine` with the model's own forward, and opens the
   :class:`~tp_plugin.step_guard.foreign_collectives.CollectiveWatch`. In the very first training
   forward: makes ZeRO-3 forget the order in which forwards before it read parameters.
4. :meth:`StepGuard._before_backbone`, a forward pre-hook of the backbone. Does the work of 2 and 3 for loops that run
   the model without its head; then no loss can be compared.
5. The forward. Hooks of the watch note which outputs take a gradient.
6. ``InputGuard.note_draws``, a forward hook of the backbone and of the model. Notes the random generators in use.
7. ``DeepSpeedEngine.backward``, patched by ``integrations/deepspeed``, calls
   :meth:`StepGuard.before_backward`. First: closes the collective watch and compares the loss over the TP group.
8. The backward. Gradient hooks of the watch fold the gradients of replicas. The next step's 3 compares them, and
   refuses a parameter without a gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tp_plugin import log
from tp_plugin.errors import NO_FULLGRAPH, agree
from tp_plugin.partitioned import has_partitioned
from tp_plugin.sharding import Sharding
from tp_plugin.sharding.inputs import ATTRIBUTE as INPUTS
from tp_plugin.sharding.inputs import InputGuard, broadcast_over_replicas
from tp_plugin.step_guard.comparison import Run, StepComparison, warn_unchecked
from tp_plugin.step_guard.foreign_collectives import CollectiveWatch
from tp_plugin.step_guard.fp32_rerun import custom_functions
from tp_plugin.step_guard.gradients import GradientWatch
from tp_plugin.step_guard.reachable_state import StateSnapshot
from tp_plugin.step_guard.replicas import is_turn, require_equal_replicas
from tp_plugin.step_guard.sample_batch import is_plain
from tp_plugin.step_guard.unsharded_view import backbone_of
from tp_plugin.weights.gather import forget_evaluation, unwrapped

ATTRIBUTE = "tp_guard"
_KEPT_ON = False


def keep_guards_on() -> None:
    """Let guards made from now on run, whatever their config says: libraries are of versions without a test."""
    global _KEPT_ON
    _KEPT_ON = True


class StepGuard:
    """Watches one sharded model; the module's docstring lists what it does when.

    Attributes:
        due: the next forward is examined, by mode (True: training).
        compared: description of what the last examined training step compared; empty if nothing was.
        replicas_due: replicas are compared at the next training forward; set by a checkpoint load.
        gradients: the watch of the first backward; None once it has found every gradient right.
        forwards: training forwards so far.
    """

    def __init__(self, model: nn.Module, record: Sharding) -> None:
        self.model, self.mesh, self.config = model, record.mesh, record.config
        on = self.config.guard or _KEPT_ON
        self.due = {True: on, False: on}
        self.compared = ""
        self.replicas_due = False
        self.gradients: GradientWatch | None = GradientWatch(model) if on else None
        self.forwards = 0
        self.inputs: InputGuard = model.__dict__[INPUTS]
        self._collectives = CollectiveWatch(self.mesh)  # from a forward of the first step to its backward
        self._inside_model = False  # the backbone's forward to come is part of the model's
        self._warned_of_backbone = False
        self.inputs.then.append(self._before_forward)
        backbone = backbone_of(model)
        backbone.register_forward_pre_hook(self._before_backbone, with_kwargs=True)
        backbone.register_forward_hook(self.inputs.note_draws)
        model.__dict__[ATTRIBUTE] = self

    def request(self) -> None:
        """Check everything again at the next training step."""
        self.due[True] = self.replicas_due = True
        self.compared = ""
        if self.gradients is None:
            self.gradients = GradientWatch(self.model)

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        training = model.training and torch.is_grad_enabled()
        self._collectives.close()
        by_trainer = bool(self.compared)  # the trainer's loss was compared, which is all of it
        if training:
            self._inside_model = True
            self._before_training()
        if self.due[training] and model.training == training:
            if not training and not self.due[True]:
                self.due[False] = False  # its training has been examined
            elif is_plain((args, kwargs)):
                self.examine(lambda m, batch: m(*batch["args"], **batch["kwargs"]), {"args": args, "kwargs": kwargs})
            elif training:
                self.due[True] = False
                warn_unchecked("inputs that are no tensors, such as a cache, would be modified", None)
        if training:
            self._before_first()
            if not by_trainer:
                self._watch_collectives()

    def _watch_collectives(self) -> None:
        """A loop makes its loss after the forward, so its collectives come before its backward."""
        if self.gradients is not None:
            self._collectives.open()

    def before_backward(self, loss: Any) -> None:
        """Compare the first step's loss, or one that was requested, over the TP group; collective over the world."""
        self._collectives.close()
        if self.gradients is not None:
            self.gradients.compare_loss(loss, self.mesh)

    @torch.compiler.disable(reason=NO_FULLGRAPH)
    def _before_backbone(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Loops may run the model without its head, and never the model itself: no loss can be compared then."""
        recomputation = torch._C._current_graph_task_id() != -1
        if not backbone.training or not torch.is_grad_enabled() or recomputation or self.inputs.paused:
            return None
        if self._inside_model or backbone is self.model:
            self._inside_model = False
            return None
        given = self.inputs.prepare(backbone, args, kwargs)
        self._before_training()
        if self.due[True] and not self._warned_of_backbone:
            self._warned_of_backbone = True
            warn_unchecked("the loss is made of a part of the model, whose own forward is not called", None)
        self._before_first()
        self._watch_collectives()
        return given

    def _before_training(self) -> None:
        self._collectives.close()
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

    def _before_first(self) -> None:
        """Keep what the examination's forwards read, in evaluation mode, from being fetched ahead in training."""
        if self.forwards == 1:
            forget_evaluation(self.model)

    @torch.compiler.disable(reason=NO_FULLGRAPH)
    def examine(
        self,
        run: Run,
        batch: Mapping[str, Any],
        wrapper: nn.Module | None = None,
        beside: Sequence[nn.Module] = (),
        roots: Sequence[Any] = (),
    ) -> None:
        """Run a sample of ``batch`` sharded and unsharded and compare; a collective call, over the world in training.

        Args:
            wrapper: the object that ``run`` calls as the model: a PeftModel or an engine around it; None is the model.
            beside: other sharded models that take part, such as DPO's reference, or engines around them.
            roots: objects that hold the state of the runs, such as a trainer. Changes of it are undone. Where it holds
                the model, the unsharded view takes its place.

        Raises:
            TensorParallelError: on every rank: loss or outputs differ, by how much, and in which layer first.
        """
        training = self.model.training
        self.due[training] = False
        wrappers = [self.model if wrapper is None else wrapper, *beside]
        models = [unwrapped(one) for one in wrappers]
        # evaluation may be run by one replica alone
        group = None if training else self.mesh.tp_group
        if training and any(map(has_partitioned, models)):
            # parameters are gathered over the replicas too, which must then read the same ones
            batch = broadcast_over_replicas(dict(batch), self.mesh)
        watching = [self.gradients, *(vars(m).get(INPUTS) for model in models for m in model.modules())]
        with in_evaluation_mode(models, [one for one in watching if one is not None]):
            state = StateSnapshot([*roots, *custom_functions(models).values()], models)
            result = StepComparison(run, models, wrappers, self.mesh, group, state).compare(batch)
        agree(result.error, group)
        if training:
            self.compared = result.compared
            if result.compared and not self.config.quiet:
                log.info(f"the first step agrees with the same step without tensor parallelism: {result.compared}")


@contextlib.contextmanager
def in_evaluation_mode(models: Sequence[nn.Module], watching: Sequence[Any]) -> Iterator[None]:
    """Run forwards in evaluation mode, uncompiled and with ``watching`` paused."""
    modules = [module for model in models for module in model.modules()]
    modes = [(module, module.training) for module in modules]
    compiled = [(m, m._compiled_call_impl) for m in modules if m._compiled_call_impl is not None]
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


def guard_of(model: Any) -> StepGuard | None:
    """The guard of a sharded model, or of the sharded model inside a wrapper; None if there is none."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return next((m.__dict__[ATTRIBUTE] for m in modules if ATTRIBUTE in m.__dict__), None)
