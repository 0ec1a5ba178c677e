"""An environment of one set, built from nothing outside the repository's own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.ranks import ROOT
from tests.versions.sets import VersionSet

TOOLS = ("pytest>=8", "pytest-xdist>=3", "hypothesis>=6", "datasets>=3", "packaging", "pyyaml", "safetensors", "numpy")
BUILD = ("pip", "hatchling", "editables", "setuptools", "wheel", "ninja", "packaging", "numpy")
"""Installed before DeepSpeed, which pip builds from source beside torch."""
_STAMP = "built.json"


def build(one: VersionSet, folder: Path, fresh: bool = False) -> Path:
    """Return the Python of the set's environment in ``folder``; it is built unless it was built of the same pins."""
    place = (folder / one.name).absolute()
    wanted = [one.torch_requirement, *one.libraries]
    stamp = place / _STAMP
    if not fresh and stamp.exists() and json.loads(stamp.read_text()) == wanted:
        return place / "bin" / "python"
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([interpreter(one), "-m", "venv", place], check=True)
    python = place / "bin" / "python"
    install(python, *BUILD)
    index = os.environ.get("TORCH_INDEX")
    install(python, one.torch_requirement, *(["--index-url", index] if index else []))
    # the torch that is there stays: its requirement is given again
    install(python, "--no-build-isolation", one.torch_requirement, *one.libraries, *TOOLS)
    install(python, "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    stamp.write_text(json.dumps(wanted))
    return python


def interpreter(one: VersionSet) -> str:
    """The Python that the set asks for, if the search path has one that runs; else this process's own."""
    found = shutil.which(f"python{one.needs}") if one.needs else None
    if found and not subprocess.run([found, "--version"], capture_output=True, check=False).returncode:
        return found
    return sys.executable


def install(python: Path, *arguments: str) -> None:
    """Call pip; raises RuntimeError with the end of what it says if it fails."""
    command = [python, "-m", "pip", "install", "--quiet", *arguments]
    done = subprocess.run(command, env=os.environ | {"DS_BUILD_OPS": "0"}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"pip install {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")


def environment(python: Path) -> dict[str, str]:
    """Variables of a process in it: its programs first, the CPU, and one thread a rank."""
    return os.environ | {
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
    }
