"""Dry run of ``save_pretrained``: it writes every file but weights, and records the tensors of each weight file.

transformers' own method runs once, on tensors without data. It writes config and code, drops tied names, reverts
conversions and numbers the files. Instead of writing weights, it records which parameters they are made of.
"""

from __future__ import annotations

import collections
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, modeling_utils

from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.features import SAVING
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.param_info import full_shape
from tp_plugin.weights.stream import Output, View, persistent

Files = list[tuple[str, list[Output], dict[str, str]]]
"""(file name, tensors, metadata of its header) of every file of weights."""


upstream = Upstream(SAVING)
_RECORDED = "the contents of a model's files are recorded from it"
_METHOD = ["save_directory", "is_main_process", "state_dict"]
upstream.needs(modeling_utils, "safe_save_file", ["tensors", "filename", "metadata"], _RECORDED)
upstream.needs(PreTrainedModel, "save_pretrained", _METHOD, _RECORDED)
upstream.needs(PreTrainedModel, "get_parameter_or_buffer", ["target"], "it looks for tied weights")
upstream.needs(PreTrainedModel, "_hf_peft_config_loaded", None, "add_adapter says by it that only adapters are saved")


class _Tracing(TorchFunctionMode):
    """Records of which named tensors each tensor was made, and makes no copies, so that a view stays one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.contiguous, torch.Tensor.clone):
            return args[0]
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if made:
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            names = tuple(dict.fromkeys(name for leaf in given for name in leaf.__dict__.get("tp_sources", ())))
            for leaf in made:
                leaf.tp_sources = names  # type: ignore[attr-defined]
        return out


def files_of(model: Any, staging: Path, options: Mapping[str, Any]) -> Files:
    """Let transformers write all files but weights into ``staging``; return the plan of the weight files."""
    sources, hollow = persistent(model), {}
    for name, tensor in sources.items():
        hollow[name] = torch.empty(full_shape(tensor), dtype=tensor.dtype, device="meta")
        hollow[name].tp_sources = (name,)  # type: ignore[attr-defined]
    storages = {StorageWeakRef(tensor.untyped_storage()): name for name, tensor in hollow.items()}
    files: Files = []

    def record(tensors: Mapping[str, torch.Tensor], filename: str, metadata: dict[str, str] | None = None) -> None:
        outputs = []
        for name, tensor in tensors.items():
            source = storages.get(StorageWeakRef(tensor.untyped_storage()))
            shape = tuple(tensor.shape)
            view = View(shape, tensor.stride(), int(tensor.storage_offset())) if source is not None else None
            made_of = (source,) if source is not None else tensor.tp_sources  # type: ignore[attr-defined]
            if not made_of:
                raise TensorParallelError(f"it is not known of which parameters transformers makes {name!r} on saving.")
            outputs.append(Output(name, tensor.dtype, shape, made_of, view))
        files.append((os.path.basename(filename), outputs, metadata or {}))

    options = {"max_shard_size": "5GB"} | dict(options)
    original = modeling_utils.safe_save_file
    modeling_utils.safe_save_file = record  # type: ignore[assignment]
    adapted = getattr(model, "_hf_peft_config_loaded", False)
    if adapted:  # it looks for ties among the model's parameters, and none has a name that adapters are saved by
        model.get_parameter_or_buffer = collections.defaultdict[str, object](object).__getitem__
    try:
        with _Tracing():
            model.save_pretrained(staging, state_dict=dict(hollow), is_main_process=True, **options)
    finally:
        modeling_utils.safe_save_file = original
        if adapted:
            del model.get_parameter_or_buffer
    for index in staging.glob("*.index*.json"):
        text = json.loads(index.read_text())  # transformers counted the parameters of this rank
        distinct = {id(tensor): full_shape(tensor) for tensor in model.parameters()}
        text["metadata"]["total_parameters"] = sum(map(math.prod, distinct.values()))
        index.write_text(json.dumps(text, indent=2, sort_keys=True) + "\n")
    return files
