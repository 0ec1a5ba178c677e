"""Checkpoints written by hand."""

from __future__ import annotations

from pathlib import Path

import torch

from tp_plugin.layout import ShardLayout
from tp_plugin.weights.fragments import Fragments, fragment_key
from tp_plugin.weights.manifest import WEIGHT, Entry, Manifest, RankFile
from tp_plugin.weights.safetensors_file import write_tensors


def stored(folder: Path, full: torch.Tensor, layout: ShardLayout, cuts: list[float]) -> Fragments:
    """``full`` as a checkpoint of data-parallel ranks that hold the pieces of a shard between ``cuts``."""
    files = {}
    bounds = [0.0, *sorted(cuts), 1.0]
    for rank in range(layout.ranks):
        if layout.owns_none(rank):
            continue
        flat = layout.shard(full, rank).reshape(-1)
        for dp_rank in range(len(bounds) - 1):
            start, stop = (int(bound * flat.numel()) for bound in bounds[dp_rank : dp_rank + 2])
            name = f"rank_{rank}_{dp_rank}.safetensors"
            content = {fragment_key(WEIGHT, "a.weight", start): flat[start:stop]} if start < stop else {}
            size, sha256 = write_tensors(folder / name, content)
            files[name] = RankFile(tp_rank=rank, dp_rank=dp_rank, bytes=size, sha256=sha256)
    entry = Entry(layout=layout, dtype="F32", trained=False, buffer=False, names=("a.weight",))
    manifest = manifest_of({"a.weight": entry}, files, layout.ranks)
    (folder / "manifest.json").write_bytes(manifest.dump())
    return Fragments(folder, Manifest.load(folder))


def manifest_of(entries: dict[str, Entry], files: dict[str, RankFile], tp: int) -> Manifest:
    return Manifest(
        tp=tp, dp=1, zero=1, step=3, entries=entries, optimizer=None, engine={}, scheduler=None, scaler=None,
        client=None, model={}, files=files, versions={},
    )  # fmt: skip
