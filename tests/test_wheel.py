"""The built wheel, installed into an empty environment, trains with the README's script."""

from __future__ import annotations

import os
import re
import sys
import venv

import pytest

from tests.support.examples import prepare, run, trl_script
from tests.support.launching import output_of
from tests.support.ranks import ROOT


def called(*command: str) -> None:
    """Run a command that does not see this checkout on its path: pip would take the package for installed."""
    output_of(command, {name: value for name, value in os.environ.items() if name != "PYTHONPATH"})


@pytest.mark.slow
def test_the_wheel_alone_runs_the_readme(tmp_path):
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = str(environment / "bin/python")
    called(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("*.whl")
    # torch first and alone, as in the Makefile: nothing that follows may choose another build
    (torch,) = re.findall(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), re.M)
    called(python, "-m", "pip", "install", "--quiet", torch)
    pinned = str(ROOT / "constraints.txt")
    called(python, "-m", "pip", "install", "--quiet", "--constraint", pinned, f"{wheel}[peft,trl]")
    assert list(environment.glob("lib/python*/site-packages/tp_plugin_startup.pth")), "TP_PLUGIN=1 would do nothing"
    place = prepare(tmp_path / "place")
    (place / "sft.py").write_text(trl_script())
    launch = ["accelerate", "launch", "--config_file", "cpu.yaml", "-m", "tp_plugin.run", "sft.py"]
    run(place, *launch, environment=environment)
    assert (place / "outputs/sft/adapter_model.safetensors").is_file()
    assert re.fullmatch(
        r"tp-plugin \d+\.\d+\.\d+\n?", run(place, "tp-plugin", "--version", sharded=False, environment=environment)
    )
