"""Contracts of every minor version between the sets: one library varied at a time beside the pinned others.

python -m tests.versions.minors [LIBRARY ...] [--envs DIR]

A version is downloaded without its requirements and put in front of an environment of the set "pinned". What it
requires of small libraries otherwise (an older huggingface_hub, an older tokenizers) comes from the folder "older".
The table is tests/versions/minors.json, from which docs/upstream.md is written.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from packaging.version import Version

from tests.support.ranks import ROOT
from tests.versions import environment
from tests.versions.__main__ import ENVIRONMENTS
from tests.versions.sets import HERE, sets

TABLE = HERE / "minors.json"
OLDEST = {"transformers": "5.6", "accelerate": "1.11", "peft": "0.18.1", "trl": "0.24", "deepspeed": "0.18.4"}
"""The first version of each that a set has."""
OLDER = ("huggingface_hub<2", "tokenizers<=0.23.0")
"""What versions of transformers before 5.16 require."""
EVERY_PATCH = ("deepspeed",)
"""Libraries whose patch releases move names."""


def main() -> int:
    """Check the contracts of every minor and write the table; entries of other libraries are kept."""
    parser = argparse.ArgumentParser(prog="python -m tests.versions.minors", description=__doc__.splitlines()[0])
    parser.add_argument("libraries", nargs="*", metavar="LIBRARY", help=f"of {', '.join(OLDEST)}; all without one")
    parser.add_argument("--envs", type=Path, default=ENVIRONMENTS, help="where environments are built and kept")
    options = parser.parse_args()
    python = environment.build(sets()["pinned"], options.envs)
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    for library in options.libraries or OLDEST:
        table[library] = {}
        for version in versions(python, library):
            table[library][version] = lost(python, unpacked(python, library, version, options.envs), options.envs)
            print(library, version, table[library][version] or "all names hold", flush=True)
            TABLE.write_text(json.dumps(table, indent=1) + "\n")
    return 0


def versions(python: Path, library: str) -> Iterator[str]:
    """The last patch of every minor from :data:`OLDEST` on, or every patch; the oldest first."""
    command = [python, "-m", "pip", "index", "versions", library]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = next(line for line in said.splitlines() if line.startswith("Available versions:"))
    known = sorted(Version(one.strip()) for one in line.partition(":")[2].split(","))
    wanted = [one for one in known if one >= Version(OLDEST[library])]
    last = {one if library in EVERY_PATCH else one.release[:2]: str(one) for one in wanted}
    yield from last.values()


def unpacked(python: Path, library: str, version: str, envs: Path) -> Path:
    """The version's files, without its requirements."""
    place = envs / "minors" / f"{library}-{version}"
    if place.exists():
        return place
    with tempfile.TemporaryDirectory() as folder:
        command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-compile"]
        command += ["--target", str(Path(folder, "found")), f"{library}=={version}"]
        subprocess.run(command, env=os.environ | {"DS_BUILD_OPS": "0"}, check=True, capture_output=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(Path(folder, "found"), place)
    return place


def lost(python: Path, place: Path, envs: Path) -> list[str]:
    """Sentences of the features that are lost with the version in front; an error of the import itself otherwise."""
    said = ""
    for front in ([place], [place, _older(python, envs)]):
        command = [python, "-m", "tp_plugin.launch.cli", "doctor", "--json", "--no-test"]
        path = ":".join(str(one) for one in [*front, ROOT])
        env = environment.environment(python) | {"PYTHONPATH": path}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        broken = [line["text"] for line in lines if line["state"] == "lost"]
        if lines and not any("is required for a normal functioning" in text for text in broken):
            return [text.partition("; ")[0] for text in broken]
        said = (done.stderr.strip().splitlines() or ["it does not run"])[-1]
    return [f"it does not run beside the pinned libraries: {said[:200]}"]


def _older(python: Path, envs: Path) -> Path:
    place = envs / "minors" / "older"
    if not place.exists():
        command = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--target", place, *OLDER]
        subprocess.run(command, check=True, capture_output=True)
    return place


if __name__ == "__main__":
    sys.exit(main())
