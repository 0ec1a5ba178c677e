"""Exports through DeepSpeed's engine and ``zero_to_fp32``: they give the full model, or refuse.

DeepSpeed's own would find nothing to gather in our layers, and ``save_16bit_model`` would write rank 0's shard.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import zero_to_fp32

from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.features import ENGINE_EXPORT
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.sharding import state_of
from tp_plugin.weights import full_state_dict
from tp_plugin.weights.fragments import Fragments
from tp_plugin.weights.manifest import FILE, WEIGHT, Manifest

upstream = Upstream(ENGINE_EXPORT)
_WHY = "exports of a sharded model go through it"
_READS = ["ds_checkpoint_dir", "exclude_frozen_parameters"]

SCRIPT_NAME = "zero_to_fp32.py"
"""Name of DeepSpeed's script beside its checkpoints, to which documentation points; ours has one too."""
SCRIPT = '''#!/usr/bin/env python
"""Turn the tp_plugin checkpoint in this folder into an ordinary HF directory.

    python zero_to_fp32.py . OUTPUT_DIRECTORY [--tag global_step500]

It runs "tp-plugin export CHECKPOINT OUTPUT_DIRECTORY". Other options of DeepSpeed's script are ignored: the files are
safetensors, in the dtype that the model was trained in.
"""

import argparse
import os
import sys

try:
    from tp_plugin.launch.cli import main
except ImportError:
    sys.exit("this checkpoint is tp_plugin's: pip install tp-plugin, then run: tp-plugin export CHECKPOINT DIRECTORY")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

parser.add_argument("checkpoint_dir")
parser.add_argument("output_dir")
parser.add_argument("-t", "--tag")
parser.add_argument("--max_shard_size", default="5GB")
given, _ = parser.parse_known_args()

checkpoint = os.path.join(given.checkpoint_dir, given.tag) if given.tag else given.checkpoint_dir
sys.exit(main(["export", checkpoint, given.output_dir, "--max-shard-size", given.max_shard_size]))
'''


@upstream.patch(DeepSpeedEngine, "_consolidated_16bit_state_dict", ["exclude_frozen_parameters"], _WHY)
@upstream.patch(DeepSpeedEngine, "_zero3_consolidated_16bit_state_dict", ["exclude_frozen_parameters"], _WHY)
def _consolidated(original: Callable[..., Any], self: DeepSpeedEngine, exclude_frozen_parameters: bool = False) -> Any:
    if state_of(self.module) is None:
        return original(self, exclude_frozen_parameters)
    state = full_state_dict(self, trainable_only=exclude_frozen_parameters)
    return state if not dist.is_initialized() or dist.get_rank() == 0 else None  # as DeepSpeed returns


@upstream.patch(DeepSpeedEngine, "save_16bit_model", ["save_dir", "save_filename", "exclude_frozen_parameters"], _WHY)
def _save_16bit_model(original: Callable[..., Any], self: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
    if state_of(self.module) is None:
        return original(self, *args, **kwargs)
    raise TensorParallelError(
        "save_16bit_model would write one rank's shard, as a pickle; use "
        "tp_plugin.save_pretrained(engine, directory), which writes the full model as safetensors."
    )


@upstream.patch(
    zero_to_fp32, "_get_fp32_state_dict_from_zero_checkpoint", _READS, "it looks for pickles in our checkpoints"
)
def _read_checkpoint(original: Callable[..., Any], ds_checkpoint_dir: str, exclude_frozen_parameters: bool) -> Any:
    """Read our checkpoints too; every function of ``deepspeed.utils.zero_to_fp32`` calls this one."""
    directory = Path(ds_checkpoint_dir)
    if not (directory / FILE).is_file():
        return original(ds_checkpoint_dir, exclude_frozen_parameters)
    return fp32_state_dict(directory, trainable_only=exclude_frozen_parameters)


def fp32_state_dict(directory: Path, *, trainable_only: bool = False) -> dict[str, torch.Tensor]:
    """Full master weights (float32) and buffers of a checkpoint of ours, read by one process without a collective.

    Args:
        trainable_only: omit parameters that were not trained.

    Raises:
        TensorParallelError: the checkpoint is damaged, or was saved without its frozen parameters.
    """
    manifest = Manifest.load(directory)
    fragments = Fragments(directory, manifest)
    found: dict[str, torch.Tensor] = {}
    try:
        for name, entry in manifest.entries.items():
            if trainable_only and not (entry.trained or entry.buffer):
                continue
            if not entry.stored:
                raise TensorParallelError(
                    f"the checkpoint {str(directory)!r} was saved without frozen parameters such as {name!r}; ask with "
                    "exclude_frozen_parameters=True, or export the model while it trains (tp_plugin.save_pretrained)."
                )
            tensor = fragments.full(WEIGHT, name)
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            found |= dict.fromkeys(entry.names, tensor)
    finally:
        fragments.close()
    return found
