"""``tp-plugin inspect``: find an engine checkpoint, and report on it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.checkpoint_folders import checkpoints_in, named_by_latest
from tp_plugin.weights.fragments import damage_of
from tp_plugin.weights.manifest import FILE, WEIGHT, Manifest
from tp_plugin.weights.safetensors_file import dtype_named


def found(path: Path) -> Path:
    """The checkpoint at ``path``: itself, the one that its ``latest`` names, or the newest in it; never one beside it.

    Raises:
        TensorParallelError: there is none, or ``latest`` names something else.
    """
    if (path / FILE).is_file():
        return path
    named = named_by_latest(path)
    if named is not None:
        return named
    newest = checkpoints_in(path, beside=False) if path.is_dir() else []
    if newest:
        return newest[0]
    whole = next(iter(checkpoints_in(path)), None) if path.is_dir() else None
    beside = f"; the newest beside it is {str(whole)!r}" if whole else ""
    raise TensorParallelError(f"there is no whole checkpoint of tp_plugin's at {str(path)!r}{beside}.")


def report(path: Path) -> dict[str, Any]:
    """Content of a checkpoint and its validity, for JSON; ``problem`` is None for a valid one."""
    checkpoint = found(path)
    problem = damage_of(checkpoint)
    said: dict[str, Any] = {"checkpoint": str(checkpoint), "whole": problem is None, "problem": problem}
    try:
        manifest = Manifest.load(checkpoint)
    except TensorParallelError:
        return said
    entries = manifest.entries.values()
    trained = [entry for entry in entries if entry.trained]
    optimizer = manifest.optimizer or {}
    return said | {
        "step": manifest.step,
        "tp": manifest.tp,
        "dp": manifest.dp,
        "zero": manifest.zero,
        "model": manifest.model.get("class"),
        "parameters": sum(math.prod(entry.layout.shape) for entry in entries if not entry.buffer),
        "trained": sum(math.prod(entry.layout.shape) for entry in trained),
        "dtypes": sorted({str(dtype_named(entry.dtype)).removeprefix("torch.") for entry in entries}),
        "optimizer": optimizer.get("class"),
        "states": [WEIGHT, *optimizer.get("elementwise", [])],
        "scheduler": manifest.scheduler is not None,
        "files": len(manifest.files),
        "bytes": sum(record.bytes for record in manifest.files.values()),
        "versions": dict(manifest.versions),
    }


def described(said: dict[str, Any]) -> str:
    """The report in a few lines."""
    lines = [said["checkpoint"]]
    if "step" in said:
        lines += [
            f"  {said['model']} after {said['step']} steps, of tp={said['tp']} dp={said['dp']} ZeRO-{said['zero']}",
            f"  {said['parameters']:,} parameters in {', '.join(said['dtypes'])}, {said['trained']:,} of them trained",
            f"  {said['optimizer'] or 'no optimizer'}, kept for each element: {', '.join(said['states'])}"
            + (", with its learning rate schedule" if said["scheduler"] else ""),
            f"  {said['files']} files of {said['bytes'] / 1e6:,.1f} MB, by "
            + ", ".join(f"{name} {version}" for name, version in said["versions"].items()),
        ]
    return "\n".join([*lines, f"  {'WHOLE' if said['whole'] else 'DAMAGED: ' + said['problem']}"])
