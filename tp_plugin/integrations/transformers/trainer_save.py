"""Trainer's saving of a sharded model: its weights, checkpoints and uploads, all ranks together.

Trainer asks the engine for all weights and has its ``_save`` write them. Subclasses write in their own ways (a part's
``save_pretrained``, ``torch.save`` of a part's ``state_dict()``), mostly on rank 0 alone, and would get shards there.

Work that Trainer does on rank 0 alone fails on every rank where it fails. A script that catches the failure would
otherwise continue on rank 0, and the other ranks would wait for it in the next collective.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME

from tp_plugin.errors import failing_together, meet
from tp_plugin.integrations.accelerate.degree import tp_size
from tp_plugin.integrations.checkpoint_folders import named_by_latest
from tp_plugin.integrations.features import TRAINER
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.sharding import state_of
from tp_plugin.weights import optimizer_placeholder
from tp_plugin.weights.gather import full_state_dict, unwrapped
from tp_plugin.weights.manifest import FILE
from tp_plugin.weights.stream import persistent

upstream = Upstream(TRAINER)
_SHARED = "its failure on rank 0 is shared"
upstream.needs(Trainer, "_save", ["output_dir", "state_dict"], _SHARED)
upstream.needs(Trainer, "init_hf_repo", ["token", "private"], _SHARED, older=(["token"],))


class Written(dict):
    """Stands for a state dict whose tensors are in the directory already."""


_WRITERS: dict[type[nn.Module], Callable[..., None]] = {}


def register_writer(kind: type[nn.Module], writer: Callable[..., None]) -> None:
    """Let ``Trainer.save_model`` of a sharded ``kind`` be ``writer(model_or_engine, directory)``, on every rank."""
    _WRITERS[kind] = writer


@upstream.patch(Trainer, "save_model", ["output_dir", "_internal_call"], "a sharded model is streamed")
def _save_model(
    original: Callable[..., Any], self: Trainer, output_dir: str | None = None, _internal_call: bool = False
) -> None:
    """Stream the weights, which Trainer would gather on rank 0, and let Trainer write the rest.

    A model of another class is gathered: Trainer's subclass decides how it and its parts are written.
    """
    model = unwrapped(self.model)
    if state_of(model) is None:
        original(self, output_dir, _internal_call)
        return
    state: dict[str, Any] = Written()
    writer = next((writer for kind, writer in _WRITERS.items() if isinstance(model, kind)), None)
    if writer is None:
        meet("save_model")
        state = full_state_dict(self.model_wrapped)
    else:
        writer(self.model_wrapped, output_dir or self.args.output_dir or ".")
    with given(self, state):
        original(self, output_dir, _internal_call)


@contextlib.contextmanager
def given(trainer: Trainer, state: dict[str, Any]) -> Iterator[None]:
    """While open, Trainer gets ``state`` wherever it asks for a full state dict, and so does every part of the model.

    Tensors in ``state`` are written on rank 0 only. Where rank 0 fails, all ranks do; before transformers 5.23 ranks
    that write nothing do not call ``_save``, and learn of it on leaving.
    """
    writes = isinstance(state, Written) or not dist.is_initialized() or dist.get_rank() == 0
    original, push, called = trainer._save, trainer.push_to_hub, False

    def _save(*args: Any, **options: Any) -> None:
        nonlocal called
        called = True
        with failing_together():
            if writes:
                original(*args, **options)

    def others_failed() -> None:
        nonlocal called
        if not called:
            called = True
            with failing_together():
                pass

    def push_to_hub(*args: Any, **options: Any) -> Any:
        others_failed()
        return push(*args, **options)

    def get_state_dict(*_args: Any, **_options: Any) -> dict[str, Any]:
        return state

    places: list[tuple[Any, str, Any]] = [
        (trainer, "_save", _save),
        (trainer, "push_to_hub", push_to_hub),
        (trainer.accelerator, "get_state_dict", get_state_dict),
    ]
    if trainer.deepspeed is not None:  # PEFT at ZeRO-3 asks the engine
        places.append((trainer.deepspeed, "_zero3_consolidated_16bit_state_dict", get_state_dict))
    with contextlib.ExitStack() as stack:
        for place, name, method in places:
            stack.enter_context(placed(place, name, method))
        if not isinstance(state, Written):
            stack.enter_context(answering(unwrapped(trainer.model), state))
        yield
        others_failed()


_AT_HAND: dict[int, torch.Tensor] = {}
"""Full tensors by the id of the shard; on rank 0, while Trainer writes a model that was gathered."""


def at_hand(part: nn.Module) -> dict[str, torch.Tensor] | None:
    """Return the state dict of a part of the model with full tensors while Trainer writes it; None at other times."""
    if not _AT_HAND:
        return None
    return {name: _AT_HAND.get(id(tensor), tensor.detach()) for name, tensor in persistent(part).items()}


@contextlib.contextmanager
def answering(model: nn.Module, state: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """While open, ``state_dict()`` of every module in ``model`` returns the full tensors in ``state``."""
    full = {id(tensor): state[name] for name, tensor in persistent(model).items() if name in state}

    def answer(module: nn.Module) -> Callable[..., Any]:
        def state_dict(*args: Any, keep_vars: bool = False, **options: Any) -> Any:
            if args or keep_vars or options.get("destination") is not None:  # asked by a module around it
                return type(module).state_dict(module, *args, keep_vars=keep_vars, **options)
            found = type(module).state_dict(module, keep_vars=True, **options)
            for name, tensor in found.items():
                found[name] = full.get(id(tensor), tensor.detach())
            return found

        return state_dict

    with contextlib.ExitStack() as stack:
        for module in model.modules() if full else ():
            stack.enter_context(placed(module, "state_dict", answer(module)))
        _AT_HAND.update(full)
        stack.callback(_AT_HAND.clear)
        yield


@contextlib.contextmanager
def placed(place: Any, name: str, value: Any) -> Iterator[None]:
    """While open, the object ``place`` has an attribute of its own; the former one, if any, is put back."""
    before = {name: place.__dict__[name]} if name in place.__dict__ else {}
    place.__dict__[name] = value
    try:
        yield
    finally:
        del place.__dict__[name]
        place.__dict__.update(before)


# ---- work of rank 0 -------------------------------------------------------------------------------------------------


def _is_sharded(trainer: Trainer) -> bool:
    return tp_size() > 1 or state_of(trainer.model) is not None


_PUSHED = ["commit_message", "blocking", "token", "revision"]


@upstream.patch(Trainer, "push_to_hub", [*_PUSHED, "private"], _SHARED, older=(_PUSHED,))
def _push_to_hub(original: Callable[..., Any], self: Trainer, *args: Any, **kwargs: Any) -> Any:
    if not _is_sharded(self):
        return original(self, *args, **kwargs)
    options = inspect.signature(original).bind(self, *args, **kwargs).arguments
    with failing_together():  # before the other ranks wait for rank 0 to save
        if self.is_world_process_zero() and self.hub_model_id is None:
            known = inspect.signature(self.init_hf_repo).parameters
            self.init_hf_repo(**{name: options.get(name) for name in ("token", "private") if name in known})
    with failing_together():  # the upload
        return original(self, *args, **kwargs)


@upstream.patch(Trainer, "_save_checkpoint", ["model", "trial"], _SHARED)
def _save_checkpoint(original: Callable[..., Any], self: Trainer, model: nn.Module, trial: Any) -> None:
    if not _is_sharded(self):
        original(self, model, trial)
        return
    with failing_together():  # files that follow the weights and the engine's checkpoint
        original(self, model, trial)


@upstream.patch(
    Trainer, "_save_optimizer_and_scheduler", ["output_dir"], "a plain Trainer would begin with a new optimizer"
)
def _save_optimizer_and_scheduler(original: Callable[..., Any], self: Trainer, output_dir: str) -> None:
    """Write a placeholder that tells a Trainer without DeepSpeed where the optimizer's state is.

    It would find no state otherwise, and silently start with a new optimizer.
    """
    original(self, output_dir)
    folder = Path(output_dir)
    named = named_by_latest(folder) if self.is_world_process_zero() else None
    if named is not None and (named / FILE).is_file():
        optimizer_placeholder.write(folder / OPTIMIZER_NAME)
