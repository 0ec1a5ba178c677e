"""``save_pretrained`` of a sharded model: an ordinary HF directory, streamed.

On rank 0 transformers itself decides which files belong in it (:mod:`.save_plan`); then all ranks stream the weights.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel, core_model_loading
from transformers.utils import hub

from tp_plugin.errors import TensorParallelError, agree, failing_together, meet
from tp_plugin.integrations.features import SAVING
from tp_plugin.integrations.transformers.save_plan import Files, files_of
from tp_plugin.integrations.transformers.trainer_save import Written, at_hand, register_writer
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.mesh import ParallelMesh
from tp_plugin.sharding import state_of
from tp_plugin.weights.gather import between_steps, mesh_of, refuse_shards, unwrapped
from tp_plugin.weights.safetensors_file import SafetensorsFile
from tp_plugin.weights.staging import Staging
from tp_plugin.weights.stream import Output, persistent, stream

upstream = Upstream(SAVING)
_STREAMED = "a sharded model's save_pretrained is streamed through it"
upstream.needs(core_model_loading, "revert_weight_conversion", ["model", "state_dict"], _STREAMED)
upstream.needs(hub, "create_and_tag_model_card", ["repo_id", "tags"], "push_to_hub makes its model card")


def save(model_or_engine: nn.Module | Any, directory: str | Path, **options: Any) -> None:
    """See :func:`tp_plugin.save_pretrained`."""
    model: Any = unwrapped(model_or_engine)
    if not isinstance(model, PreTrainedModel):
        raise TensorParallelError(
            f"{type(model).__name__} is not a transformers model; write tp_plugin.full_state_dict(model) yourself."
        )
    meet("save_pretrained")
    directory, first = Path(directory), not dist.is_initialized() or dist.get_rank() == 0
    push = {name: options.pop(name) for name in ("push_to_hub", *_HUB_OPTIONS) if name in options}
    options.pop("is_main_process", None)
    staging, files, folder = Staging(directory), Files(), directory
    error: str | None = None
    written: list[str] = []
    with contextlib.ExitStack() as stack:
        if first:
            try:
                folder = stack.enter_context(staging).path
                files = files_of(model, folder, options)
            except Exception as failure:  # any exception must reach every rank
                error = _sentence(directory, failure)
        agree(error)
        folder, files = from_first((folder, files))
        agree(_written(model_or_engine, model, folder, files))
        if first:
            try:
                written = replace_model(staging, {name for name, _, _ in files}, options.get("variant"))
            except Exception as failure:
                error = _sentence(directory, failure)
        agree(error)
    if dist.is_initialized():
        dist.barrier()  # no rank returns before the directory is complete
    if push.get("push_to_hub"):
        if first:
            try:
                _push(model, directory, written, push)
            except Exception as failure:
                error = f"{str(directory)!r} is written, pushing it failed: {type(failure).__name__}: {failure}"
        agree(error)


_HUB_OPTIONS = ("repo_id", "token", "commit_message", "create_pr", "private", "revision", "commit_description", "tags")


def _sentence(directory: Path, failure: Exception) -> str:
    what = failure if isinstance(failure, TensorParallelError) else f"{type(failure).__name__}: {failure}"
    return f"writing {str(directory)!r} failed: {what}"


def from_first(value: Any) -> Any:
    """Return global rank 0's value on every rank; a collective call."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


# ---- writing --------------------------------------------------------------------------------------------------------


def _written(engine: Any, model: Any, staging: Path, files: Files) -> str | None:
    """Stream every file into ``staging``. Returns this rank's error, or None."""
    mesh, tensors, error = mesh_of(model), persistent(model), None
    writers = _writers(mesh, staging)
    with between_steps(engine):
        for number, (filename, outputs, metadata) in enumerate(files):
            replica, writer = writers[number % len(writers)]
            file: SafetensorsFile | None = None
            if (mesh.dp_rank, mesh.tp_rank) == (replica, writer) and error is None:
                try:
                    header = {output.name: (output.dtype, output.shape) for output in outputs}
                    file = SafetensorsFile(staging / filename, header, metadata)
                except Exception as failure:
                    error = _sentence(staging.parent, failure)

            def sink(output: Output, elements: torch.Tensor, start: int, file: SafetensorsFile | None = file) -> None:
                if file is not None:
                    file.write(output.name, elements, start)

            compute = functools.partial(core_model_loading.revert_weight_conversion, model)
            try:
                stream(tensors, outputs, mesh, replica=replica, writer=writer, sink=sink, compute=compute)
                if file is not None:
                    file.close()
            except Exception as failure:  # shared with the other ranks after all files
                error = _sentence(staging.parent, failure)
    return error


def _writers(mesh: ParallelMesh, staging: Path) -> list[tuple[int, int]]:
    """Return (replica, TP rank) of every rank that sees the directory, neighbours in different replicas."""
    if not dist.is_initialized():
        return [(0, 0)]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (mesh.tp_rank, mesh.dp_rank, staging.is_dir()))
    return [(replica, rank) for rank, replica, sees in sorted(everyone) if sees]


def replace_model(staging: Staging, weights: set[str], variant: str | None = None) -> list[str]:
    """Move the files in by :meth:`Staging.move_in`, and delete the weights of a model that was there.

    Of a model with adapters by transformers' ``add_adapter`` only those were written, and a model there stays.
    """
    stale: set[Path] = set()
    if (staging.path / "config.json").is_file():
        infix, directory = f".{variant}" if variant else "", staging.directory
        stale = {directory / f"model{infix}.safetensors", directory / f"model.safetensors.index{infix}.json"}
        stale |= set(directory.glob(f"model{infix}-?????-of-?????.safetensors"))
        stale -= {directory / name for name in weights}
    return staging.move_in(weights, stale)


def _push(model: Any, directory: Path, files: Sequence[str], options: Mapping[str, Any]) -> None:
    """Upload ``files`` and a model card, as transformers' own ``push_to_hub=True`` does."""
    from huggingface_hub import HfApi

    token, tags = options.get("token"), options.get("tags") or []
    tags = [*(model.model_tags or []), *([tags] if isinstance(tags, str) else tags)]
    api = HfApi(token=token)
    name = options.get("repo_id") or directory.name
    repo = api.create_repo(name, exist_ok=True, private=options.get("private")).repo_id
    card = hub.create_and_tag_model_card(repo, list(dict.fromkeys(tags)) or None, token=token)
    card.save(directory / "README.md")
    api.upload_folder(
        repo_id=repo,
        folder_path=directory,
        allow_patterns=[glob.escape(file) for file in (*files, "README.md")],
        commit_message=options.get("commit_message") or "Upload model",
        commit_description=options.get("commit_description"),
        create_pr=options.get("create_pr", False),
        revision=options.get("revision"),
    )


# ---- the model's own methods ----------------------------------------------------------------------------------------


@upstream.patch(PreTrainedModel, "save_pretrained", ["save_directory", "is_main_process", "state_dict"], _STREAMED)
def _save_pretrained(
    original: Callable[..., Any],
    self: PreTrainedModel,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: dict | None = None,
    *args: Any,
    **options: Any,
) -> None:
    if isinstance(state_dict, Written):
        return
    if state_dict is None:
        state_dict = at_hand(self)
    if state_of(self) is None:
        original(self, save_directory, is_main_process, state_dict, *args, **options)
    elif state_dict is not None:
        if nothing_here(state_dict, is_main_process):
            return
        refuse_shards(self, state_dict, getattr(self, "peft_config", None) or ())
        original(self, save_directory, is_main_process, state_dict, *args, **options)
    elif args:
        raise TensorParallelError(
            "save_pretrained of a sharded model takes directory, is_main_process and state_dict by position; give "
            "its other options by name."
        )
    else:
        save(self, os.fspath(save_directory), **options)


def nothing_here(state: Mapping[str, Any], main: bool) -> bool:
    """Tell if ``state`` is the empty state dict of a rank that does not save."""
    return not state and (not main or (dist.is_initialized() and dist.get_rank() != 0))


@upstream.patch(PreTrainedModel, "push_to_hub", ["repo_id"], "every rank would upload a model")
def _push_to_hub(original: Callable[..., Any], self: PreTrainedModel, repo_id: str, **options: Any) -> Any:
    """Save by all ranks together and upload once; transformers would do both on every rank.

    (Trainer's ``push_to_hub`` uploads what ``save_model`` wrote.)
    """
    if state_of(self) is None:
        return original(self, repo_id, **options)
    with contextlib.ExitStack() as stack:
        with failing_together():
            directory = stack.enter_context(tempfile.TemporaryDirectory())  # rank 0's is used
        save(self, directory, push_to_hub=True, repo_id=repo_id, **options)
    return f"https://huggingface.co/{repo_id}"


register_writer(PreTrainedModel, save)
