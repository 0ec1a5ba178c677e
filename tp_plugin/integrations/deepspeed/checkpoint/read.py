"""Loading a checkpoint into an engine, whatever the topology of either."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tp_plugin import log
from tp_plugin.errors import TensorParallelError, agree
from tp_plugin.integrations import zero3
from tp_plugin.integrations.deepspeed.checkpoint import optimizer_compat, optimizer_fragments
from tp_plugin.integrations.deepspeed.checkpoint.optimizer_fragments import EngineState
from tp_plugin.integrations.deepspeed.checkpoint.write import COUNTERS, KEPT_OF_GROUPS
from tp_plugin.weights.fragments import Fragments
from tp_plugin.weights.gather import unwrapped
from tp_plugin.weights.manifest import WEIGHT, Manifest, decode
from tp_plugin.weights.rng_state import forget, remember, reseed, set_generators

HOW_IT_COMPUTES = ("foreach", "fused", "capturable", "differentiable")
"""Options of a parameter group that select an implementation: this engine's own are kept."""
WHAT_IT_IS = ("decoupled_weight_decay",)
"""Options that select the algorithm (Adam or AdamW): never loaded from a checkpoint."""


def read(
    engine: Any, directory: Path, *, strict: bool, optimizer: bool, scheduler: bool, counters: bool
) -> dict[str, Any]:
    """See :func:`tp_plugin.integrations.deepspeed.checkpoint.engine.load`; the files have been checked."""
    error, loading = None, None
    try:
        loading = _Loading(engine, directory, strict=strict, optimizer=optimizer)
    except TensorParallelError as refused:
        error = str(refused)
    except Exception as failure:  # the other ranks are waiting
        error = f"the checkpoint {str(directory)!r} could not be compared: {type(failure).__name__}: {failure}"
    agree(error)
    assert loading is not None
    try:
        loading.weights()
        if optimizer:
            loading.states()
    except Exception as failure:
        error = f"the checkpoint {str(directory)!r} was read in part, and this engine holds a mixture: {failure}"
    agree(error)
    loading.masters()
    if optimizer:
        loading.options()
        loading.randomness()
    if counters:
        loading.counters()
    if scheduler and engine.lr_scheduler is not None and loading.manifest.scheduler is not None:
        engine.lr_scheduler.load_state_dict(loading.decoded(loading.manifest.scheduler))
    client = loading.decoded(loading.manifest.client)
    loading.fragments.close()
    loading.announce()
    return client


class _Loading:
    """One checkpoint and one engine, compared when made. Raises TensorParallelError if they do not match."""

    def __init__(self, engine: Any, directory: Path, *, strict: bool, optimizer: bool) -> None:
        self.engine, self.directory = engine, directory
        self.state = EngineState.of(engine)
        self.mesh, self.params, self.base = self.state.mesh, self.state.params, self.state.optimizer
        self.manifest = Manifest.load(directory)
        self.fragments = Fragments(directory, self.manifest)
        self._check_model(strict)
        if optimizer and self.base is not None:
            self._check_optimizer()

    def _check_model(self, strict: bool) -> None:
        entries, where = self.manifest.entries, str(self.directory)
        stored = {name for name, entry in entries.items() if entry.stored}
        wanted = {name for name, tensor in self.params.items() if strict or tensor.requires_grad}
        missing = [name for name in self.params if name in wanted - stored]
        unknown = [name for name in entries if name not in self.params]
        if missing or unknown:
            theirs, ours = self.manifest.model.get("class"), type(self.engine.module).__name__
            what = f"has no {missing[0]!r}" if missing else f"has {unknown[0]!r}, which this model has not"
            left_out = any(name in entries for name in missing)
            fix = (
                "it was saved without frozen parameters: load with load_module_strict=False"
                if left_out
                else "load it into the model it was saved from"
            )
            more = len(missing) + len(unknown) - 1
            what += f" (and {more} more differ)" if more else ""
            raise TensorParallelError(
                f"the checkpoint {where!r} is of another model ({theirs}; this is {ours}): it {what}; {fix}."
            )
        for name, layout in self.state.layouts.items():
            if name in stored and entries[name].layout.shape != layout.shape:
                vocabulary = " (the vocabulary has another size?)" if "emb" in name or "head" in name else ""
                raise TensorParallelError(
                    f"the checkpoint {where!r} is of another model: {name!r} has shape "
                    f"{list(entries[name].layout.shape)} in it and {list(layout.shape)} here{vocabulary}."
                )

    def _check_optimizer(self) -> None:
        saved, where = self.manifest.optimizer, str(self.directory)
        if saved is None:
            raise TensorParallelError(
                f"the checkpoint {where!r} was saved without an optimizer; load it with load_optimizer_states=False."
            )
        different = optimizer_compat.state_mismatch(saved, self.base)
        if different is not None:
            raise TensorParallelError(
                f"the checkpoint {where!r} holds the state of {different}; use the same, or load with "
                "load_optimizer_states=False."
            )
        groups = list(self.state.groups())
        ours = {name for _, names in groups for name in names}
        ours |= {name for name, tensor in self.params.items() if tensor.requires_grad}
        # stage 0 used to list frozen parameters as well
        theirs = [{name for name in group["names"] if name in ours} for group in saved["groups"]]
        if [set(names) for _, names in groups] != theirs:
            raise TensorParallelError(
                f"the parameter groups of the checkpoint {where!r} ({len(saved['groups'])}) and of this optimizer "
                f"({len(groups)}) differ; make the optimizer as before, or load with load_optimizer_states=False."
            )
        self.scalars: dict[str, Any] = {}
        for group in saved["groups"]:
            for found in group["scalars"]:
                self.scalars |= dict.fromkeys(found["names"], found["state"])
        for flat in self.state.flats:
            known = [name for name in flat.names if name in self.scalars]
            if any(self.scalars[n] != self.scalars[known[0]] for n in known):
                raise TensorParallelError(
                    f"the checkpoint {where!r} has unequal step counts in the parameter group of {known[0]!r}, which "
                    "ZeRO steps together; load it at ZeRO stage 0."
                )

    def decoded(self, value: Any) -> Any:
        """Decode a value of the manifest; its tensors are in the first rank's file."""
        return decode(value, self.fragments.extra)

    def flat(self, kind: str, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements ``[start, stop)`` of this rank's flattened shard."""
        return self.fragments.flat(kind, name, self.state.layouts[name], self.mesh.tp_rank, start, stop)

    @torch.no_grad()
    def weights(self) -> None:
        """Load master weights, and the weights of parameters and buffers without them."""
        for piece in self.state.fragments:
            target = piece.of(piece.flat.tensor)
            target.copy_(self.flat(WEIGHT, piece.name, piece.start, piece.start + piece.numel))
        trained = self.state.trained()
        for name, tensor in self.params.items():
            if name not in self.manifest.entries or not self.manifest.entries[name].stored:
                continue
            if zero3.is_partitioned(tensor):
                zero3.partition_data(tensor).copy_(self.flat(WEIGHT, name, *zero3.partition_range(tensor)))
            elif name not in trained:
                tensor.data.copy_(self.flat(WEIGHT, name).view(tensor.shape))

    @torch.no_grad()
    def states(self) -> None:
        """Load the optimizer's state of every flat tensor; delete it if the checkpoint has none."""
        if self.base is None:
            return
        kinds = optimizer_compat.state_names(self.manifest.optimizer, self.base)
        same = optimizer_compat.is_same(self.manifest.optimizer, self.base)
        pieces: dict[int, list[optimizer_fragments.Fragment]] = {}
        for piece in self.state.fragments:
            pieces.setdefault(id(piece.flat), []).append(piece)
        for flat in self.state.flats:
            known = [name for name in flat.names if name in self.scalars]
            if not known:
                self.base.state.pop(flat.tensor, None)
                continue
            before, state = dict(flat.state), self.base.state[flat.tensor]
            state.clear()
            for kind, own in kinds.items():
                dtype = next((self.fragments.dtype(kind, n) for n in known if self.fragments.has(kind, n)), None)
                if dtype is None:
                    continue
                kept: Any = before.get(own)
                fits = isinstance(kept, torch.Tensor) and kept.shape == flat.tensor.shape
                state[own] = kept.zero_() if fits else torch.zeros_like(flat.tensor, dtype=dtype)
                for piece in pieces.get(id(flat), ()):
                    if self.fragments.has(kind, piece.name):
                        stop = piece.start + piece.numel
                        piece.of(state[own]).copy_(self.flat(kind, piece.name, piece.start, stop))
            scalars = self.decoded(self.scalars[known[0]])
            device = flat.tensor.device
            state |= {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in scalars.items()}
            if optimizer_fragments.STEP in scalars:
                group = self.base.param_groups[flat.group]
                state[optimizer_fragments.STEP] = steps_of(
                    self.base, group, device, scalars[optimizer_fragments.STEP], same=same
                )

    def masters(self) -> None:
        """Copy the master weights to the model's weights; a collective call."""
        optimizer_fragments.masters_changed(self.engine)
        zero3.release_persistent(self.engine.optimizer)

    def options(self) -> None:
        """Load learning rates, betas and the other options of parameter groups."""
        if self.base is None:
            return
        for group, saved in zip(self.base.param_groups, self.manifest.optimizer["groups"], strict=True):
            for key, value in self.decoded(saved["options"]).items():
                if key not in (*KEPT_OF_GROUPS, *WHAT_IT_IS) and not (key in HOW_IT_COMPUTES and key in group):
                    group[key] = value

    def randomness(self) -> None:
        """Load this rank's generators; at another topology, those of its data-parallel rank."""
        same = (self.manifest.tp, self.manifest.dp) == (self.mesh.tp_size, self.mesh.dp_size)
        tp_rank = self.mesh.tp_rank if same else 0
        dp_rank = self.mesh.dp_rank % self.manifest.dp
        for index, record in enumerate(self.manifest.files.values()):
            if (record.tp_rank, record.dp_rank) == (tp_rank, dp_rank):
                set_generators(lambda key, index=index: self.fragments.extra(key, index))
        if self.mesh.dp_rank >= self.manifest.dp:
            reseed(self.mesh.dp_rank)
        model = unwrapped(self.engine.module)
        if same:
            forget(model)
        else:
            remember(model, self.directory)

    def counters(self) -> None:
        """Load the counts of steps and samples, and the loss scale."""
        saved = dict(self.manifest.engine)
        accumulation = self.engine.gradient_accumulation_steps()
        if saved["gradient_accumulation_steps"] != accumulation:
            saved["micro_steps"] = saved["global_steps"] * accumulation
        saved["micro_steps"] -= saved["micro_steps"] % accumulation  # gradients accumulated until then are not saved
        for name in COUNTERS:
            setattr(self.engine, name, saved[name])
        scaler = self.decoded(self.manifest.scaler)
        set_loss_scale(getattr(self.engine.optimizer, "loss_scaler", None), scaler.get("loss_scaler", {}))
        autocast = getattr(self.engine.optimizer, "torch_autocast_gradscaler", None)
        if autocast is not None and "autocast" in scaler:
            autocast.load_state_dict(scaler["autocast"])

    def announce(self) -> None:
        """Log one line."""
        here = f"tp={self.mesh.tp_size} dp={self.mesh.dp_size} ZeRO-{int(self.engine.zero_optimization_stage())}"
        log.info(
            f"resumed a checkpoint of {self.manifest.shape()} at {here}: step {self.manifest.step} of "
            f"{str(self.directory)!r}"
        )


def steps_of(optimizer: Any, group: Mapping[str, Any], device: torch.device, steps: Any, *, same: bool) -> Any:
    """Convert saved steps to the type in which ``optimizer`` counts them.

    The ``same`` class keeps the saved type. Otherwise DeepSpeed's classes get a number and torch's a tensor. A tensor
    is on the CPU, or on ``device`` if the group is ``fused`` or ``capturable``, as in
    ``torch.optim.Optimizer.load_state_dict``.
    """
    if not same:
        of_deepspeed = type(optimizer).__module__.startswith("deepspeed")
        steps = int(steps) if of_deepspeed else torch.as_tensor(steps, dtype=torch.float32)
    if not isinstance(steps, torch.Tensor):
        return steps
    return steps.to(device if group.get("fused") or group.get("capturable") else "cpu")


def set_loss_scale(scaler: Any, saved: Mapping[str, Any]) -> None:
    """Set the attributes of a dynamic loss scaler; a static one keeps its config's scale.

    A scale is the config's int at first, and a float once it has changed.
    """
    if not (getattr(scaler, "dynamic", False) and saved.get("dynamic")):
        return
    for name, value in saved.items():
        kinds = {type(getattr(scaler, name, None)), type(value)}
        if len(kinds) == 1 or kinds == {int, float}:
            setattr(scaler, name, value)
