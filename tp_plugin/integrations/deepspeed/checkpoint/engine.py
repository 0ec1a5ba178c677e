"""``save_checkpoint`` and ``load_checkpoint`` of an engine, in a format that any (tp, dp, ZeRO stage) resumes.

DeepSpeed's own checkpoints are pickles of each rank's memory, and load at the same topology only. Ours (see
:mod:`tp_plugin.weights.manifest`) store everything under the name of its parameter. A rank that loads computes from
the layouts the ranges that it needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine

from tp_plugin import log
from tp_plugin.errors import TensorParallelError, agree
from tp_plugin.integrations.checkpoint_folders import (
    LATEST,
    LATEST_GOOD,
    checkpoints_in,
    named_by_latest,
    newest_whole,
)
from tp_plugin.integrations.deepspeed.checkpoint import read, write
from tp_plugin.integrations.deepspeed.export import SCRIPT, SCRIPT_NAME
from tp_plugin.integrations.features import CHECKPOINTS
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.sharding import state_of
from tp_plugin.step_guard.guard import guard_of
from tp_plugin.weights.atomic import bring_back, write_file, written_whole
from tp_plugin.weights.fragments import damage_found_together
from tp_plugin.weights.gather import between_steps
from tp_plugin.weights.manifest import FILE

upstream = Upstream(CHECKPOINTS)
_SAVE = ["save_dir", "tag", "client_state", "save_latest", "exclude_frozen_parameters"]
_LOAD = ["load_dir", "tag", "load_module_strict", "load_optimizer_states", "load_lr_scheduler_states"]
_LOAD += ["load_module_only", "custom_load_fn"]


def is_ours(engine: DeepSpeedEngine) -> bool:
    """Return True if an engine saves in our format: we sharded its model, or its config asks for the format.

    A ``tp_plugin`` block with an ``autotp_size`` of 1 shards nothing; it asks for checkpoints that any degree resumes.
    """
    return state_of(engine.module) is not None or "tp_plugin" in (engine._config._param_dict or {})


@upstream.patch(DeepSpeedEngine, "save_checkpoint", _SAVE, "our checkpoints are written there")
def _save_checkpoint(
    original: Callable[..., Any],
    self: DeepSpeedEngine,
    save_dir: str,
    tag: str | None = None,
    client_state: dict | None = None,
    save_latest: bool = True,
    exclude_frozen_parameters: bool = False,
) -> bool:
    arguments = (save_dir, tag, client_state or {}, save_latest, exclude_frozen_parameters)
    return save(self, *arguments) if is_ours(self) else original(self, *arguments)


def save(
    engine: DeepSpeedEngine,
    save_dir: str | Path,
    tag: str | None = None,
    client_state: dict | None = None,
    save_latest: bool = True,
    exclude_frozen_parameters: bool = False,
) -> bool:
    """Write ``save_dir/tag`` completely or not at all, then its name to ``save_dir/latest``. A collective call.

    ``client_state`` is global rank 0's. Raises TensorParallelError on every rank.
    """
    _refuse_local_storage(engine)
    folder, tag = Path(save_dir), str(tag or f"global_step{engine.global_steps}")
    _refuse_different(tag)
    get_accelerator().synchronize()  # the last step may still run on another stream
    with between_steps(engine):
        with written_whole(folder / tag) as temporary:
            write.write(engine, temporary, client_state or {}, exclude_frozen_parameters)
        _write_on_rank0(folder / SCRIPT_NAME, SCRIPT)
        if save_latest:
            _write_on_rank0(folder / LATEST, tag)
    return True


@upstream.patch(DeepSpeedEngine, "load_checkpoint", _LOAD, "our checkpoints are read there")
def _load_checkpoint(
    original: Callable[..., Any],
    self: DeepSpeedEngine,
    load_dir: str,
    tag: str | None = None,
    load_module_strict: bool = True,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
    custom_load_fn: Callable | None = None,
) -> tuple[str | None, dict | None]:
    chosen = _chosen(Path(load_dir), tag, needed=is_ours(self))
    if chosen is None and not is_ours(self):
        return original(
            self, load_dir, tag, load_module_strict, load_optimizer_states, load_lr_scheduler_states,
            load_module_only, custom_load_fn,
        )  # fmt: skip
    if chosen is None:
        return None, None
    if custom_load_fn is not None:
        raise TensorParallelError("custom_load_fn is for DeepSpeed's own checkpoints; load this one without.")
    optimizer = load_optimizer_states and not load_module_only
    scheduler = load_lr_scheduler_states and not load_module_only
    return load(self, chosen, strict=load_module_strict, optimizer=optimizer, scheduler=scheduler,
                counters=not load_module_only)  # fmt: skip


def load(
    engine: DeepSpeedEngine,
    directory: Path,
    *,
    strict: bool = True,
    optimizer: bool = True,
    scheduler: bool = True,
    counters: bool = True,
) -> tuple[str, dict]:
    """Load a checkpoint of ours into an engine of any topology; a collective call.

    Every rank first checks its share of the files and compares them with its model and optimizer. Nothing is changed
    before all ranks agree.

    Args:
        strict: require every parameter of the model in the checkpoint.
        optimizer: load its state too, and the generators' states.
        scheduler: load the engine's learning rate scheduler.
        counters: load the counts of steps and samples, and the loss scale.

    Returns:
        the directory, and the saved ``client_state``.

    Raises:
        TensorParallelError: on every rank: the checkpoint is damaged, or of another model.
    """
    damage = damage_found_together(directory)
    if damage is not None:
        raise TensorParallelError(_with_offer(damage, directory.parent))
    get_accelerator().synchronize()
    with between_steps(engine):
        client = read.read(
            engine, directory, strict=strict, optimizer=optimizer, scheduler=scheduler, counters=counters
        )
    guard = guard_of(engine.module)
    if guard is not None:
        guard.replicas_due = True
    return str(directory), client


def _chosen(folder: Path, tag: str | None, *, needed: bool) -> Path | None:
    """Directory of the requested checkpoint, the same on all ranks; None if it is not one of ours.

    Raises:
        TensorParallelError: one of ours is ``needed`` and the requested one is missing or not ours.
    """
    answer: list[Any] = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            answer = _look(folder, tag, needed)
        except Exception as failure:  # the other ranks are waiting
            reason = str(getattr(failure, "strerror", None) or failure).rstrip(".")
            answer = [None, f"looking for a checkpoint in {str(folder)!r} failed: {reason}."]
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    path, problem = answer
    if problem == LATEST_GOOD:
        path = newest_whole(folder)
        if path is None and needed:
            raise TensorParallelError(f"there is no whole checkpoint of tp_plugin's in {str(folder)!r}.")
        return path
    if problem is not None:
        raise TensorParallelError(_with_offer(problem, folder))
    return path


def _look(folder: Path, tag: str | None, needed: bool) -> list[Any]:
    if tag == LATEST_GOOD:
        return [None, LATEST_GOOD]
    path = named_by_latest(folder) if tag is None else folder / str(tag)
    if path is None:
        if needed and checkpoints_in(folder):
            return [None, f"{str(folder)!r} has no file {LATEST!r}, so no save was completed there."]
        if needed:
            log.info(f"no checkpoint in {str(folder)!r}: training starts from step 0")
        return [None, None]
    with contextlib.suppress(OSError):  # a folder that is read-only
        bring_back(path)
    if (path / FILE).is_file():
        return [path, None]
    if not needed:
        return [None, None]
    if any(path.glob("*.pt")):
        problem = (
            f"{str(path)!r} is a DeepSpeed checkpoint, tied to its topology: convert it to weights with the "
            "zero_to_fp32.py beside it, or save again with a 'tp_plugin' block and autotp_size 1 in the config."
        )
        return [None, problem]
    missing = "is not a whole checkpoint" if path.is_dir() else "does not exist"
    return [None, f"{str(path)!r} {missing}."]


def _with_offer(problem: str, folder: Path) -> str:
    """Append the checkpoint that could be loaded instead; a collective call."""
    newest = newest_whole(folder)
    offer = f"the newest whole checkpoint is {str(newest)!r}" if newest else "no other is whole there"
    return f"{problem.rstrip('.')}; {offer}."


def _refuse_local_storage(engine: DeepSpeedEngine) -> None:
    if engine.use_node_local_storage():
        raise TensorParallelError(
            "checkpoint.use_node_local_storage keeps each host's files on that host, and another shape needs all of "
            "them; remove it and save to a shared file system."
        )


def _refuse_different(tag: str) -> None:
    """Raise on every rank if the ranks' tags differ; a collective call."""
    if dist.is_initialized():
        tags: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(tags, tag)
        if len(set(tags)) > 1:
            raise TensorParallelError(f"save_checkpoint was given different tags, {sorted(set(tags))}; use one.")


def _write_on_rank0(path: Path, text: str) -> None:
    """Write a small file on rank 0; raise its failure on every rank."""
    error = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            write_file(path, text.encode())
        except Exception as failure:  # the other ranks are waiting
            error = f"writing {str(path)!r} failed: {getattr(failure, 'strerror', None) or failure}."
    agree(error)
