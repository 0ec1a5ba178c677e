"""Small sharded models in a world of two ranks, and a folder that all ranks see."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import tp_plugin
from tests.support.models import make
from tp_plugin.config import TensorParallelConfig


def folder() -> Path:
    """A directory that all ranks see."""
    found = [tempfile.mkdtemp()]
    dist.broadcast_object_list(found)
    return Path(found[0])


def sharded(family: str = "Llama", **options) -> nn.Module:
    model = make(family, **options)
    tp_plugin.shard_model(model, TensorParallelConfig(tp_size=2, quiet=True))
    return model


def differing(found: dict, wanted: dict) -> list[str]:
    """Names of what is missing, strange or another tensor."""
    same = {name for name in found.keys() & wanted.keys() if torch.equal(found[name], wanted[name])}
    return sorted((found.keys() | wanted.keys()) - same)
