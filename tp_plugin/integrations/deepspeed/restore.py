"""A checkpoint put into an engine, whatever shape either has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tp_plugin.errors import TensorParallelError, agree
from tp_plugin.integrations.deepspeed import alike, held
from tp_plugin.integrations.deepspeed.store import COUNTERS, KEPT_OF_GROUPS, layout_of, named, refuse_other_parallelism
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh
from tp_plugin.weights.fragments import Fragments
from tp_plugin.weights.gather import mesh_of, unwrapped
from tp_plugin.weights.manifest import WEIGHT, Manifest, decode
from tp_plugin.weights.randomness import forget, part_ways, remember, set_generators

HOW_IT_COMPUTES = ("foreach", "fused", "capturable", "differentiable")
"""Options of a parameter group that say how and not what: this engine's own are kept."""
WHAT_IT_IS = ("decoupled_weight_decay",)
"""Options that say which optimizer it is (Adam or AdamW): never taken from a checkpoint."""


def read(
    engine: Any, directory: Path, *, strict: bool, optimizer: bool, scheduler: bool, counters: bool
) -> dict[str, Any]:
    """See :func:`tp_plugin.integrations.deepspeed.checkpoint.load`; the files are known to be whole."""
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
        error = f"the checkpoint {str(directory)!r} was read in part, and this engine is no longer whole: {failure}"
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
    """One checkpoint and one engine, compared when made. Raises TensorParallelError where they do not fit."""

    def __init__(self, engine: Any, directory: Path, *, strict: bool, optimizer: bool) -> None:
        self.engine, self.directory = engine, directory
        refuse_other_parallelism(engine)
        self.mesh: ParallelMesh = mesh_of(unwrapped(engine.module))
        self.manifest = Manifest.load(directory)
        self.fragments = Fragments(directory, self.manifest)
        self.params = named(engine)
        self.layouts: Mapping[str, ShardLayout] = {name: layout_of(t, self.mesh) for name, t in self.params.items()}
        self.flats, self.pieces = held.flats(engine, {id(tensor): name for name, tensor in self.params.items()})
        self.base = held.base_optimizer(engine)
        self._check_model(strict)
        if optimizer and self.base is not None:
            self._check_optimizer()

    def _check_model(self, strict: bool) -> None:
        entries, where = self.manifest.entries, str(self.directory)
        stored = {name for name, entry in entries.items() if entry.stored}
        wanted = {name for name, tensor in self.params.items() if strict or tensor.requires_grad}
        missing = [name for name in self.params if name in wanted - stored]
        strange = [name for name in entries if name not in self.params]
        if missing or strange:
            theirs, ours = self.manifest.model.get("class"), type(self.engine.module).__name__
            what = f"has no {missing[0]!r}" if missing else f"has {strange[0]!r}, which this model has not"
            left_out = any(name in entries for name in missing)
            fix = (
                "it was saved without frozen parameters: load with load_module_strict=False"
                if left_out
                else "load it into the model it was saved from"
            )
            more = len(missing) + len(strange) - 1
            what += f" (and {more} more differ)" if more else ""
            raise TensorParallelError(
                f"the checkpoint {where!r} is of another model ({theirs}; this is {ours}): it {what}; {fix}."
            )
        for name, layout in self.layouts.items():
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
        different = alike.difference(saved, self.base)
        if different is not None:
            raise TensorParallelError(
                f"the checkpoint {where!r} holds the state of {different}; use the same, or load with "
                "load_optimizer_states=False."
            )
        groups = list(held.group_names(self.engine, self.flats))
        ours = {name for _, names in groups for name in names}
        ours |= {name for name, tensor in self.params.items() if tensor.requires_grad}
        # stage 0 used to list frozen parameters as well
        theirs = [{name for name in group["names"] if name in ours} for group in saved["groups"]]
        if [set(names) for _, names in groups] != theirs:
            raise TensorParallelError(
                f"the checkpoint {where!r} has {len(saved['groups'])} parameter groups and this optimizer "
                f"{len(groups)}, or other parameters in them; make the optimizer as it was made before, or load with "
                "load_optimizer_states=False."
            )
        self.scalars: dict[str, Any] = {}
        for group in saved["groups"]:
            for found in group["scalars"]:
                self.scalars |= dict.fromkeys(found["names"], found["state"])
        for flat in self.flats:
            known = [name for name in flat.names if name in self.scalars]
            if any(self.scalars[n] != self.scalars[known[0]] for n in known):
                raise TensorParallelError(
                    f"the optimizer of the checkpoint {where!r} has taken unequal numbers of steps for parameters of "
                    f"one group (that of {known[0]!r}), which ZeRO steps together; load it at ZeRO stage 0."
                )

    def decoded(self, value: Any) -> Any:
        """What was encoded, its tensors read from the first rank's file."""
        return decode(value, self.fragments.extra)

    def flat(self, kind: str, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements of this rank's shard."""
        return self.fragments.flat(kind, name, self.layouts[name], self.mesh.tp_rank, start, stop)

    @torch.no_grad()
    def weights(self) -> None:
        """Master weights, and what has none."""
        for piece in self.pieces:
            target = piece.of(piece.flat.tensor)
            target.copy_(self.flat(WEIGHT, piece.name, piece.start, piece.start + piece.numel))
        trained = {name for flat in self.flats for name in flat.names}
        for name, tensor in self.params.items():
            if name not in self.manifest.entries or not self.manifest.entries[name].stored:
                continue
            if hasattr(tensor, "ds_id"):
                start, stop = held.partition_range(tensor)
                held.partition(tensor)[: stop - start].copy_(self.flat(WEIGHT, name, start, stop))
            elif name not in trained:
                tensor.data.copy_(self.flat(WEIGHT, name).view(tensor.shape))

    @torch.no_grad()
    def states(self) -> None:
        """The optimizer's state of every flat tensor; what the checkpoint has none of begins anew."""
        if self.base is None:
            return
        kinds = alike.state_names(self.manifest.optimizer, self.base)
        same = alike.is_same(self.manifest.optimizer, self.base)
        pieces: dict[int, list[held.Held]] = {}
        for piece in self.pieces:
            pieces.setdefault(id(piece.flat), []).append(piece)
        for flat in self.flats:
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
            if held.STEP in scalars:
                group = self.base.param_groups[flat.group]
                state[held.STEP] = steps_of(self.base, group, device, scalars[held.STEP], same=same)

    def masters(self) -> None:
        """The model's weights follow the master weights; a collective call."""
        optimizer = self.engine.optimizer
        held.masters_changed(self.engine)
        kept_whole = getattr(optimizer, "persistent_parameters", None)
        if kept_whole:  # released, so that leaving the checkpoint gathers them anew
            kept_whole[0].partition(kept_whole)

    def options(self) -> None:
        """Learning rates, betas and what else is kept by parameter group."""
        if self.base is None:
            return
        for group, saved in zip(self.base.param_groups, self.manifest.optimizer["groups"], strict=True):
            for key, value in self.decoded(saved["options"]).items():
                if key not in (*KEPT_OF_GROUPS, *WHAT_IT_IS) and not (key in HOW_IT_COMPUTES and key in group):
                    group[key] = value

    def randomness(self) -> None:
        """Each rank's generators; where the shape differs, those of its data-parallel rank."""
        same = (self.manifest.tp, self.manifest.dp) == (self.mesh.tp_size, self.mesh.dp_size)
        tp_rank = self.mesh.tp_rank if same else 0
        dp_rank = self.mesh.dp_rank % self.manifest.dp
        for index, record in enumerate(self.manifest.files.values()):
            if (record.tp_rank, record.dp_rank) == (tp_rank, dp_rank):
                set_generators(lambda key, index=index: self.fragments.extra(key, index))
        if self.mesh.dp_rank >= self.manifest.dp:
            part_ways(self.mesh.dp_rank)
        model = unwrapped(self.engine.module)
        if same:
            forget(model)
        else:
            remember(model, self.directory)

    def counters(self) -> None:
        """Steps, samples and the loss scale."""
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
        """One line, on the first rank."""
        if dist.is_initialized() and dist.get_rank():
            return
        here = f"tp={self.mesh.tp_size} dp={self.mesh.dp_size} ZeRO-{int(self.engine.zero_optimization_stage())}"
        print(
            f"tp_plugin: resumed a checkpoint of {self.manifest.shape()} at {here}: step {self.manifest.step} of "
            f"{str(self.directory)!r}",
            flush=True,
        )


def steps_of(optimizer: Any, group: Mapping[str, Any], device: torch.device, steps: Any, *, same: bool) -> Any:
    """Steps as ``optimizer`` counts them: in the type they were saved in, if that was by the ``same`` class.

    Otherwise DeepSpeed's in a number, torch's in a tensor. A tensor lies on the CPU unless the group is ``fused`` or
    ``capturable``, whose kernels want it beside the parameter, on ``device`` (see
    ``torch.optim.Optimizer.load_state_dict``).
    """
    if not same:
        of_deepspeed = type(optimizer).__module__.startswith("deepspeed")
        steps = int(steps) if of_deepspeed else torch.as_tensor(steps, dtype=torch.float32)
    if not isinstance(steps, torch.Tensor):
        return steps
    return steps.to(device if group.get("fused") or group.get("capturable") else "cpu")


def set_loss_scale(scaler: Any, saved: Mapping[str, Any]) -> None:
    """Put the attributes of a dynamic loss scaler into another; a static one keeps what its config says.

    A scale begins as the config's int and is a float once it has changed.
    """
    if not (getattr(scaler, "dynamic", False) and saved.get("dynamic")):
        return
    for name, value in saved.items():
        kinds = {type(getattr(scaler, name, None)), type(value)}
        if len(kinds) == 1 or kinds == {int, float}:
            setattr(scaler, name, value)
