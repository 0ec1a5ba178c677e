"""Engine checkpoint to HF directory: offline, in one process, a tensor at a time."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, core_model_loading

from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.transformers.export import replace_model
from tp_plugin.integrations.transformers.save_plan import Files, files_of
from tp_plugin.weights.fragments import Fragments
from tp_plugin.weights.manifest import WEIGHT, Manifest
from tp_plugin.weights.safetensors_file import SafetensorsFile, dtype_named
from tp_plugin.weights.staging import Staging

TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
)
"""Files beside HF Trainer's checkpoint that belong in a model's directory."""


def export(checkpoint: Path, directory: Path, *, max_shard_size: str | int = "5GB") -> list[str]:
    """Write ``directory`` so that plain ``from_pretrained`` loads it, as ``save_pretrained`` would have.

    Master weights are read and rounded to the dtype that the model was trained in. Memory holds one full tensor and
    its pieces, or one group of tensors that transformers converts together.

    Args:
        checkpoint: a complete checkpoint; it is not validated here.
        directory: made if missing; an HF model in it is replaced.

    Returns:
        names of the files written.

    Raises:
        TensorParallelError: the model cannot be exported, or the disk is full; ``directory`` is then unchanged, or the
            message says where the remaining files are.
    """
    manifest = Manifest.load(checkpoint)
    model = _on_meta(manifest, checkpoint)
    fragments = Fragments(checkpoint, manifest)
    try:
        with Staging(directory) as staging:
            files = files_of(model, staging.path, {"max_shard_size": max_shard_size})
            _write(model, files, fragments, staging.path)
            for file in _beside(checkpoint):
                shutil.copy(file, staging.path / file.name)
            return replace_model(staging, {name for name, _, _ in files})
    except OSError as failure:
        raise TensorParallelError(
            f"writing {str(directory)!r} failed: {failure.strerror or failure}; no model there was changed."
        ) from failure
    finally:
        fragments.close()


def _on_meta(manifest: Manifest, checkpoint: Path) -> PreTrainedModel:
    """Build the model on ``meta``, its parameters in the dtypes that they were trained in."""
    left_out = [name for name, entry in manifest.entries.items() if not entry.stored]
    if left_out:
        raise TensorParallelError(
            f"the checkpoint {str(checkpoint)!r} was saved without frozen parameters such as {left_out[0]!r}; export "
            "the model while it trains, with tp_plugin.save_pretrained."
        )
    name, config = manifest.model["class"], manifest.model.get("config")
    model_class = getattr(transformers, name, None)  # only from transformers: a checkpoint runs no code
    if config is None or not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise TensorParallelError(
            f"the checkpoint {str(checkpoint)!r} is of a {name}, which is no model of the installed transformers; "
            "export it while it trains, with tp_plugin.save_pretrained."
        )
    with torch.device("meta"):
        model = model_class(_config(model_class.config_class, config))
    if manifest.model.get("generation_config") and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_dict(manifest.model["generation_config"])
    first = {alias: name for name, entry in manifest.entries.items() for alias in entry.names}
    for name, tensor in model.state_dict(keep_vars=True).items():
        entry = manifest.entries.get(first.get(name, ""))
        if entry is None or entry.layout.shape != tuple(tensor.shape):
            raise TensorParallelError(
                f"the checkpoint {str(checkpoint)!r} does not hold {name!r} of shape {list(tensor.shape)}, which the "
                f"installed transformers' {type(model).__name__} has; export it with transformers "
                f"{manifest.versions.get('transformers', 'as it was')}."
            )
        tensor.data = tensor.data.to(dtype_named(entry.dtype))
    return model


def _config(config_class: Any, config: Mapping[str, Any]) -> Any:
    """Read the config through a file: only that way transformers turns infinity back into a number."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        found, _ = config_class.get_config_dict(folder)
    return config_class.from_dict(found)


def _write(model: PreTrainedModel, files: Files, fragments: Fragments, staging: Path) -> None:
    entries = fragments.manifest.entries
    first = {alias: name for name, entry in entries.items() for alias in entry.names}

    def full(name: str) -> torch.Tensor:
        filed = first[name]
        return fragments.full(WEIGHT, filed).to(dtype_named(entries[filed].dtype))

    for filename, outputs, metadata in files:
        # the source read last and its result: neighbours are often parts of one tensor
        known: tuple[tuple[str, ...], Any] = ((), None)
        with SafetensorsFile(staging / filename, {o.name: (o.dtype, o.shape) for o in outputs}, metadata) as file:
            for output in outputs:
                if known[0] != output.sources:
                    known = ((), None)  # free it before the next is read
                    sources: Mapping[str, torch.Tensor] = {name: full(name) for name in output.sources}
                    computed = output.view is None
                    made = core_model_loading.revert_weight_conversion(model, dict(sources)) if computed else sources
                    known = output.sources, made
                if output.view is None:
                    file.write(output.name, known[1][output.name].contiguous())
                else:
                    view, source = output.view, known[1][output.sources[0]]
                    file.write(output.name, source.as_strided(view.size, view.stride, view.offset).contiguous())


def _beside(checkpoint: Path) -> list[Path]:
    for folder in (checkpoint, checkpoint.parent):
        found = [folder / name for name in TOKENIZER if (folder / name).is_file()]
        if found:
            return found
    return []
