"""The first step, computed again without us: the guard that refuses to train on a wrong loss.

A slice of the batch goes through the sharded model and through its plain twin, both in evaluation mode and from the
same random state: what differs between them is tensor parallelism, and nothing else. Losses are those of whoever trains
(a trainer's ``compute_loss``, the model's own), so code that reads a shard for a weight is caught too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tp_plugin.collectives import all_reduce_
from tp_plugin.errors import NO_FULLGRAPH, TensorParallelError, agree, together
from tp_plugin.lazy import materialise_outputs
from tp_plugin.sharding import Sharding
from tp_plugin.sharding.equal import comm_device
from tp_plugin.sharding.inputs import ATTRIBUTE as INPUTS
from tp_plugin.sharding.inputs import InputGuard, broadcast_over_replicas
from tp_plugin.verify.gradients import GradientWatch
from tp_plugin.verify.replicas import require_equal_replicas
from tp_plugin.verify.twin import plain_twin
from tp_plugin.weights.stream import between_steps

ATTRIBUTE = "tp_guard"
ROWS, LENGTH = 2, 256  # of the batch, at most
POSITIONS = 32  # of each row, whose logits are compared
TOKENWISE = {
    *("input_ids", "attention_mask", "labels", "position_ids", "token_type_ids", "inputs_embeds"),
    *("completion_mask", "assistant_masks", "shift_labels"),
}
"""Inputs whose second dimension counts tokens, so that they may be cut there together."""
LIMITS = {"loss": 1e-3, "outputs": 1e-2}
"""Largest relative differences in single and double precision."""
HALF_LIMITS = {"loss": 1e-2, "outputs": 2e-2}
"""In half precision, where the plain model's own error is less than a third of these; else three times that error."""
ROUTED = 0.2  # of outputs in half precision, where rounding may send a token to another expert

Run = Callable[[nn.Module, dict[str, Any]], Any]
"""Runs a model on a batch, as whoever trains does: a loss, or a model's output."""
Seen = dict[str, torch.Tensor]
"""The loss and samples of what the model gave, by name, in single precision."""


class StepGuard:
    """Watches one sharded model: see the module's docstring, and :mod:`gradients <tp_plugin.verify.gradients>` and
    :mod:`replicas <tp_plugin.verify.replicas>` for what else is checked when.

    Attributes:
        due: the next forward is examined, by mode (True: training).
        replicas_due: replicas are compared at the next training forward, whenever that is; set by whoever loads.
    """

    def __init__(self, model: nn.Module, record: Sharding) -> None:
        self.model, self.mesh, self.config = model, record.mesh, record.config
        self.routed = bool(record.plan.mixtures)
        self.due = {True: self.config.guard, False: self.config.guard}
        self.gradients: GradientWatch | None = GradientWatch(model) if self.config.guard else None
        self.forwards, self.replicas_due = 0, False
        self.inputs: InputGuard = model.__dict__[INPUTS]
        self.inputs.then.append(self._before_forward)
        model.__dict__[ATTRIBUTE] = self

    def request(self) -> None:
        """Check everything again at the next training step."""
        self.due[True] = self.replicas_due = True
        if self.gradients is None:
            self.gradients = GradientWatch(self.model)

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        training = model.training and torch.is_grad_enabled()
        if training:
            every = self.config.check_replicas_every
            if self.replicas_due or (every and self.forwards % every == 0):
                with between_steps(model):
                    require_equal_replicas(model, self.mesh)
                self.replicas_due = False
            self.forwards += 1
            if self.gradients is not None and self.gradients.complete():
                self.gradients.stop()
                agree(self.gradients.missing())
                self.gradients = None
            elif self.gradients is not None:
                self.gradients.start()
        if self.due[training] and model.training == training:
            if not training and not self.due[True]:
                self.due[False] = False  # its training has been examined
            elif _is_plain((args, kwargs)):
                self.examine(lambda m, batch: m(*batch["args"], **batch["kwargs"]), {"args": args, "kwargs": kwargs})

    @torch.compiler.disable(reason=NO_FULLGRAPH)
    def examine(self, run: Run, batch: Mapping[str, Any], root: nn.Module | None = None) -> None:
        """Run a slice of ``batch`` sharded and plain and compare; a collective call, over the world in training.

        Args:
            root: what ``run`` is given: the model, or a wrapper around it (a PeftModel); None is the model.

        Raises:
            TensorParallelError: on every rank: loss or outputs differ, by how much, and in which layer first.
        """
        training = self.model.training
        self.due[training] = False
        root = self.model if root is None else root
        # evaluation may be run by one replica alone
        group = None if training else self.mesh.tp_group
        if training and any(hasattr(param, "ds_id") for param in root.parameters()):
            # parameters are gathered over the replicas too, which must then read the same of them
            batch = broadcast_over_replicas(dict(batch), self.mesh)
        with self._apart(root):
            error = self._examined(run, batch, root, group)
        agree(error, group)

    def _say_unchecked(self, failure: Exception | None, group: dist.ProcessGroup | None) -> None:
        """Said once, whichever rank failed; a collective call."""
        reason = together(None if failure is None else f"{type(failure).__name__}: {failure}", group)
        if dist.get_rank(group) == 0:
            print(
                f"tp_plugin: WARNING: the first step could not be computed again without tensor parallelism "
                f"({reason}); its loss was not checked.",
                file=sys.stderr,
                flush=True,
            )

    def _examined(
        self, run: Run, batch: Mapping[str, Any], root: nn.Module, group: dist.ProcessGroup | None
    ) -> str | None:
        small = _slice(batch)
        ours, failure = self._tried(root, run, small, sharded=True)
        if self._any(failure is not None, group):  # not every batch can be cut
            small = dict(batch)
            ours, failure = self._tried(root, run, small, sharded=True)
        half, exact = self._half(), None
        if not self._any(failure is not None, group):
            plain, failure = self._tried(plain_twin(root, self.mesh), run, small)
            exact = plain
            if half and not self._any(failure is not None, group):
                exact, failure = self._tried(plain_twin(root, self.mesh, torch.float32), run, small, exact=True)
        if self._any(failure is not None, group):
            self._say_unchecked(failure, group)
            return None
        assert ours is not None
        assert plain is not None
        assert exact is not None
        found = self._difference(ours, plain, exact, half)
        if not self._any(found is not None, group):
            return None
        where = self._where(run, small, root)
        if found is None:
            return None
        return (
            f"the first step computed again without tensor parallelism differs: {found}"
            f"{f', first in {where}' if where else ''}; training would go wrong, so it is not begun; if the loss reads "
            "weights of sharded modules by itself let it use the model's outputs, else please report it (guard: false "
            "in the tp_plugin block trains regardless)."
        )

    def _half(self) -> bool:
        device = next(self.model.parameters()).device
        half = next(self.model.parameters()).dtype in (torch.bfloat16, torch.float16)
        return half or torch.is_autocast_enabled(device.type)

    def _any(self, here: bool, group: dist.ProcessGroup | None) -> bool:
        """Whether it is so on any rank that takes part; a collective call."""
        group = dist.group.WORLD if group is None else group
        flag = torch.tensor([here], dtype=torch.int32, device=comm_device(group))
        all_reduce_(flag, group, op=dist.ReduceOp.MAX, purpose="guard")
        return bool(flag)

    def _tried(
        self, model: nn.Module, run: Run, batch: Mapping[str, Any], *, sharded: bool = False, exact: bool = False
    ) -> tuple[Seen | None, Exception | None]:
        """What a run gives, or what it raised that is no word of ours and no lack of memory."""
        device = next(self.model.parameters()).device
        wide = torch.autocast(device.type, enabled=False) if exact else contextlib.nullcontext()
        try:
            with wide:
                return self._seen(model, run, batch, sharded=sharded), None
        except (TensorParallelError, torch.OutOfMemoryError):
            raise
        except Exception as failure:
            return None, failure

    def _difference(self, ours: Seen, plain: Seen, exact: Seen, half: bool) -> str | None:
        if ours.keys() != exact.keys():
            return f"it gives {', '.join(ours) or 'nothing'} here and {', '.join(exact) or 'nothing'} there"
        for name, truth in exact.items():
            value, kind = ours[name], "loss" if name == "loss" else "outputs"
            if value.shape != truth.shape:
                return f"{name} has shape {list(value.shape)} here and {list(truth.shape)} there"
            limit = LIMITS[kind]
            if half:
                limit = max(HALF_LIMITS[kind], 3 * _relative(plain[name], truth))
                limit = max(limit, ROUTED) if self.routed and kind == "outputs" else limit
            error = _relative(value, truth)
            if not (error <= limit or (torch.isnan(value).any() and torch.isnan(plain[name]).any())):
                if value.numel() == 1:
                    return f"{name} {float(value):.6g} here, {float(truth):.6g} there (allowed {limit:.1g} of it)"
                return f"{name} by {error:.2g} of its norm (allowed {limit:.1g})"
        return None

    def _seen(self, model: nn.Module, run: Run, batch: Mapping[str, Any], *, sharded: bool = False) -> Seen:
        """What one run gives; without gradients for the plain twin."""
        outputs: Seen = {}
        calls = 0

        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            nonlocal calls
            calls += 1
            for name, value in _named_tensors(output):
                outputs[f"{name} of forward {calls}" if calls > 1 else name] = _sample(value)

        handle = model.register_forward_hook(note)
        try:
            with (
                same_draws(self.model),
                # ZeRO-3 fetches ahead in a forward of the sharded model; nothing may be under way when a twin reads
                contextlib.nullcontext() if sharded else between_steps(self.model),
                torch.set_grad_enabled(sharded and torch.is_grad_enabled()),
            ):
                value = run(model, _copied(batch))
        finally:
            handle.remove()
        loss = value if isinstance(value, torch.Tensor) else getattr(value, "loss", None)
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            return {"loss": loss.detach().float().reshape(())} | outputs
        return outputs

    def _where(self, run: Run, batch: Mapping[str, Any], root: nn.Module) -> str:
        """The first layer (an entry of a list of modules, or a child of the model) whose output's norm differs."""
        norms: list[dict[str, float]] = []
        for sharded, model in ((True, root), (False, plain_twin(root, self.mesh))):
            seen: dict[str, float] = {}
            handles = []
            for name, module in model.named_modules():
                if name.rpartition(".")[2].isdigit() or name.count(".") <= 1:

                    def note(_m: nn.Module, _a: Any, output: Any, name: str = name, seen: dict = seen) -> None:
                        first = output[0] if isinstance(output, tuple | list) and output else output
                        if type(first) in (torch.Tensor, nn.Parameter) and first.is_floating_point():
                            seen.setdefault(name, float(first.detach().float().norm()))

                    handles.append(module.register_forward_hook(note))
            try:
                self._seen(model, run, batch, sharded=sharded)
            finally:
                for handle in handles:
                    handle.remove()
            norms.append(seen)
        mine, theirs = norms
        for name, norm in theirs.items():  # in the order in which modules finished
            if name in mine and abs(mine[name] - norm) > 0.02 * max(norm, 1e-6):
                return name
        return ""

    @contextlib.contextmanager
    def _apart(self, root: nn.Module) -> Iterator[None]:
        """Forwards that leave no trace: evaluation mode, nothing counted, nothing compiled."""
        modes = [(module, module.training) for module in root.modules()]
        compiled = [(m, m._compiled_call_impl) for m in root.modules() if m._compiled_call_impl is not None]
        watch, self.inputs.paused = self.gradients, True
        for module, _ in compiled:
            module._compiled_call_impl = None
        if watch is not None:
            watch.paused = True
        root.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for module, call in compiled:
                module._compiled_call_impl = call
            if watch is not None:
                watch.paused = False
            self.inputs.paused = False


def same_draws(model: nn.Module) -> contextlib.AbstractContextManager:
    """Random generators are afterwards what they were."""
    device = next(model.parameters()).device
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def guard_of(model: Any) -> StepGuard | None:
    """The guard of a sharded model, or of the sharded model inside a wrapper; None if there is none."""
    if not isinstance(model, nn.Module):
        return None
    return next((m.__dict__[ATTRIBUTE] for m in model.modules() if ATTRIBUTE in m.__dict__), None)


def _relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    value, truth = value.double(), truth.double()
    floor = 0.05 if truth.numel() == 1 else 1e-6  # a loss near zero is compared as it is
    return float((value - truth).norm() / truth.norm().clamp_min(floor))


def _named_tensors(output: Any) -> list[tuple[str, torch.Tensor]]:
    if isinstance(output, torch.Tensor):
        items: list[tuple[str, Any]] = [("output", output)]
    elif isinstance(output, Mapping):
        items = list(output.items())
    elif isinstance(output, tuple | list):
        items = [(f"output {place}", item) for place, item in enumerate(output)]
    else:
        items = list(vars(output).items()) if dataclasses.is_dataclass(output) else []
    return [
        (str(name), item)
        for name, item in items
        if isinstance(item, torch.Tensor) and item.is_floating_point() and item.dim() <= 3
    ]


@torch.no_grad()
def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """The last positions of each row, computed if they had not been."""
    part = tensor[:, -POSITIONS:] if tensor.dim() == 3 else tensor[-POSITIONS:] if tensor.dim() == 2 else tensor
    return materialise_outputs(part).detach().float().clone()


def _slice(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The first rows, and of a batch of nothing but token-wise tensors the first positions."""
    if batch.keys() == {"args", "kwargs"}:
        if batch["args"]:
            return dict(batch)
        return {"args": (), "kwargs": _slice(batch["kwargs"])}
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and value.dim()}
    rows = {value.shape[0] for value in tensors.values()}
    if len(rows) != 1:
        return dict(batch)
    made = dict(batch) | {name: value[:ROWS] for name, value in tensors.items()}
    lengths = {value.shape[1] for value in tensors.values() if value.dim() > 1}
    if tensors.keys() <= TOKENWISE and len(lengths) == 1 and all(value.dim() > 1 for value in tensors.values()):
        short = made | {name: made[name][:, :LENGTH] for name in tensors}
        labels = short.get("labels")
        if labels is None or bool((labels[:, 1:] != -100).any()):
            return short
    return made


def _copied(batch: Any) -> Any:
    """Containers anew, for code that takes entries out of them."""
    if isinstance(batch, Mapping):
        return {name: _copied(value) for name, value in batch.items()}
    return batch


def _is_plain(tree: Any) -> bool:
    """Whether the inputs are tensors and plain values only: a cache that a forward fills would be spoilt."""
    if isinstance(tree, Mapping):
        return all(_is_plain(value) for value in tree.values())
    if isinstance(tree, tuple | list):
        return all(_is_plain(value) for value in tree)
    return tree is None or isinstance(tree, torch.Tensor | int | float | str)
