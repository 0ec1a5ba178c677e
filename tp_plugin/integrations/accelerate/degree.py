"""The tensor-parallel degree of this process, as accelerate knows it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from tp_plugin.integrations.environment import with_degree
from tp_plugin.mesh import ParallelMesh


def tp_size() -> int:
    """``tensor_parallel.autotp_size`` of the DeepSpeed config this process runs with; 1 without DeepSpeed."""
    shared = AcceleratorState._shared_state
    if shared.get("distributed_type") != DistributedType.DEEPSPEED:
        return 1
    plugins = shared.get("deepspeed_plugins")
    found = plugins.values() if isinstance(plugins, dict) else [plugins] if plugins is not None else []
    return max((degree_in(plugin.deepspeed_config) for plugin in found), default=1)


def tp_size_of_launch() -> int:
    """``tp_size()`` before an ``Accelerator`` exists, from the config file that ``accelerate launch`` hands on."""
    name = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    if not uses_deepspeed() or not name:
        return 1
    try:
        config = json.loads(Path(name).read_text())
    except (OSError, ValueError):
        return 1  # accelerate reads the file next and reports it
    return degree_in(config)


def degree_in(config: Any) -> int:
    """``tensor_parallel.autotp_size`` of a DeepSpeed config, or the degree of the environment; at least 1."""
    section = with_degree(config).get("tensor_parallel") if isinstance(config, Mapping) else None
    size = section.get("autotp_size", 1) if isinstance(section, Mapping) else 1
    return max(size, 1) if isinstance(size, int) else 1


def uses_deepspeed() -> bool:
    """Tell if this process was started for DeepSpeed, as ``accelerate launch`` or a ``DeepSpeedPlugin`` says."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def parallel_mesh() -> ParallelMesh:
    """Return the groups of DeepSpeed's engine; if they do not exist yet, a collective call makes them."""
    from deepspeed.utils import groups

    groups._init_tp_mesh_device(tp_size())
    return ParallelMesh.of_groups(groups.get_tensor_model_parallel_group(), groups.get_data_parallel_group())
