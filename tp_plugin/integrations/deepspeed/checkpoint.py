"""``save_checkpoint`` and ``load_checkpoint`` of an engine, in a format that any (tp, dp, ZeRO stage) resumes.

DeepSpeed's own checkpoints are pickles of what each rank happens to hold, good for the same shape only. Ours (see
:mod:`tp_plugin.weights.manifest`) file everything under the parameter it belongs to; a rank that loads works out of the
layouts which ranges it needs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups

from tp_plugin.errors import TensorParallelError, agree
from tp_plugin.integrations.contract import Patches, contract
from tp_plugin.integrations.deepspeed import held, restore, store
from tp_plugin.sharding import state_of
from tp_plugin.verify.first_step import guard_of
from tp_plugin.weights.atomic import bring_back, write_file, written_whole
from tp_plugin.weights.manifest import FILE
from tp_plugin.weights.stream import between_steps
from tp_plugin.weights.whole import LATEST, LATEST_GOOD, candidates, examine_together, newest_whole

_SAVE = ["save_dir", "tag", "client_state", "save_latest", "exclude_frozen_parameters"]
_LOAD = ["load_dir", "tag", "load_module_strict", "load_optimizer_states", "load_lr_scheduler_states"]
_LOAD += ["load_module_only", "custom_load_fn"]


def install(patches: Patches) -> None:
    """Lay the patches; engines that are none of our business keep DeepSpeed's own."""
    patches.replace(DeepSpeedEngine, "save_checkpoint", _saving)
    patches.replace(DeepSpeedEngine, "load_checkpoint", _loading)


def check_contracts() -> None:
    """See :func:`tp_plugin.integrations.deepspeed.slot.check_contracts`."""
    contract(DeepSpeedEngine, "save_checkpoint", _SAVE, "our checkpoints are written there")
    contract(DeepSpeedEngine, "load_checkpoint", _LOAD, "our checkpoints are read there")
    contract(groups, "_get_data_parallel_group", [], "an unsharded engine's checkpoint is spread over this group")
    held.check_contracts()


def is_ours(engine: DeepSpeedEngine) -> bool:
    """Whether an engine saves in our format: its model is sharded by us, or its config says so.

    A ``tp_plugin`` block beside an ``autotp_size`` of 1 shards nothing; it asks for checkpoints that another degree can
    resume.
    """
    return state_of(engine.module) is not None or "tp_plugin" in (engine._config._param_dict or {})


def _saving(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save_checkpoint(
        self: DeepSpeedEngine,
        save_dir: str,
        tag: str | None = None,
        client_state: dict | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        state = client_state or {}
        if is_ours(self):
            return save(self, save_dir, tag, state, save_latest, exclude_frozen_parameters)
        return original(self, save_dir, tag, state, save_latest, exclude_frozen_parameters)

    return save_checkpoint


def save(
    engine: DeepSpeedEngine,
    save_dir: str | Path,
    tag: str | None = None,
    client_state: dict | None = None,
    save_latest: bool = True,
    exclude_frozen_parameters: bool = False,
) -> bool:
    """Write ``save_dir/tag``, whole or not at all, and then name it in ``save_dir/latest``. A collective call.

    ``client_state`` is global rank 0's. Raises TensorParallelError on every rank.
    """
    _refuse_local_storage(engine)
    folder, tag = Path(save_dir), str(tag or f"global_step{engine.global_steps}")
    _refuse_different(tag)
    get_accelerator().synchronize()  # nothing of the last step is under way on another stream
    with between_steps(engine):
        with written_whole(folder / tag) as temporary:
            store.write(engine, temporary, client_state or {}, exclude_frozen_parameters)
        if save_latest:
            _by_first(lambda: write_file(folder / LATEST, tag.encode()), f"writing {str(folder / LATEST)!r} failed")
    return True


def _loading(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_checkpoint(
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

    return load_checkpoint


def load(
    engine: DeepSpeedEngine,
    directory: Path,
    *,
    strict: bool = True,
    optimizer: bool = True,
    scheduler: bool = True,
    counters: bool = True,
) -> tuple[str, dict]:
    """Put a checkpoint of ours into an engine of any shape; a collective call.

    Every rank examines its share of the files first, and compares what they hold with its model and optimizer; nothing
    is touched before all agree.

    Args:
        strict: whether every parameter of the model must be in the checkpoint.
        optimizer: load its state too, and the random generators.
        scheduler: load the engine's learning rate scheduler.
        counters: load the numbers of steps and samples, and the loss scale.

    Returns:
        the directory, and the ``client_state`` it was saved with.

    Raises:
        TensorParallelError: on every rank, in one sentence: damaged, or of another model.
    """
    damage = examine_together(directory)
    if damage is not None:
        raise TensorParallelError(_with_offer(damage, directory.parent))
    get_accelerator().synchronize()
    with between_steps(engine):
        client = restore.read(
            engine, directory, strict=strict, optimizer=optimizer, scheduler=scheduler, counters=counters
        )
    guard = guard_of(engine.module)
    if guard is not None:
        guard.replicas_due = True
    return str(directory), client


def _chosen(folder: Path, tag: str | None, *, needed: bool) -> Path | None:
    """The directory of our checkpoint that was asked for, the same on all ranks; None if there is none of ours.

    Raises:
        TensorParallelError: what was asked for is missing or not ours, and ours is ``needed``.
    """
    answer: list[Any] = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            answer = _look(folder, tag, needed)
        except OSError as failure:  # the other ranks are waiting
            reason = failure.strerror or failure
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
    if tag is None:
        latest = folder / LATEST
        if not latest.is_file():
            if needed and candidates(folder):
                return [None, f"{str(folder)!r} has no file {LATEST!r}, so no save was completed there."]
            if needed:
                print(f"tp_plugin: no checkpoint in {str(folder)!r}: training begins anew", flush=True)
            return [None, None]
        tag = latest.read_text(errors="replace").strip()
    path = folder / str(tag)
    with contextlib.suppress(OSError):  # a folder that is read-only
        bring_back(path)
    if (path / FILE).is_file():
        return [path, None]
    if not needed:
        return [None, None]
    if any(path.glob("*.pt")):
        problem = (
            f"{str(path)!r} is a checkpoint of DeepSpeed's own, pickles for one shape: turn it into weights where it "
            "was saved (zero_to_fp32.py lies beside it), and give an unsharded engine's config a 'tp_plugin' block and "
            "autotp_size 1 for checkpoints that any shape resumes."
        )
        return [None, problem]
    missing = "is not a whole checkpoint" if path.is_dir() else "does not exist"
    return [None, f"{str(path)!r} {missing}."]


def _with_offer(problem: str, folder: Path) -> str:
    """The sentence, and which checkpoint could be loaded instead; a collective call."""
    newest = newest_whole(folder)
    offer = f"the newest whole checkpoint is {str(newest)!r}" if newest else "no other is whole there"
    return f"{problem.rstrip('.')}; {offer}."


def _refuse_local_storage(engine: DeepSpeedEngine) -> None:
    if engine.use_node_local_storage():
        raise TensorParallelError(
            "checkpoint.use_node_local_storage keeps each host's part to itself, and a checkpoint for any shape needs "
            "all of it in one place; remove it and save to a file system that all hosts see."
        )


def _refuse_different(tag: str) -> None:
    """Raise on every rank if they were given different tags; a collective call."""
    if dist.is_initialized():
        tags: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(tags, tag)
        if len(set(tags)) > 1:
            raise TensorParallelError(f"save_checkpoint was given different tags, {sorted(set(tags))}; use one.")


def _by_first(action: Callable[[], Any], what: str) -> None:
    error = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            action()
        except OSError as failure:
            error = f"{what}: {failure.strerror or failure}."
    agree(error)
