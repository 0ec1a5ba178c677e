"""``TP_PLUGIN=1 COMMAND``: the hook of the wheel, and what it does when a training's libraries are there."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tp_plugin
from tests.support.launching import output_of
from tests.support.ranks import ROOT
from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.import_hooks import waiting
from tp_plugin.launch import run, startup
from tp_plugin.launch.cli import main


@pytest.fixture
def calls(monkeypatch):
    """Names of what the hook calls, none of which does anything."""
    found: list[str] = []
    monkeypatch.setattr(tp_plugin, "register", lambda: found.append("register"))
    monkeypatch.setattr(run, "start_alike", lambda arguments: found.append("start alike"))
    monkeypatch.setenv("TP_PLUGIN", "1")
    monkeypatch.delenv("TP_PLUGIN_DEGREE", raising=False)
    return found


def test_it_waits_once():
    try:
        startup.wait()
        startup.wait()
        assert len(waiting()) == 1
    finally:
        for finder in waiting():
            finder.uninstall()


def test_it_registers_and_says_so_on_rank_0(calls, monkeypatch, caplog):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        startup._register()
    assert calls == ["register", "start alike"] * 2
    assert caplog.text.count("registered by TP_PLUGIN=1: models are sharded over tensor_parallel.") == 1


def test_a_worker_keeps_its_random_state(calls, monkeypatch):
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: "a trainer")
    startup._register()
    assert calls == ["register"]


def test_switched_off_it_does_nothing(calls, monkeypatch):
    monkeypatch.setenv("TP_PLUGIN", "0")
    startup._register()
    assert calls == []


@pytest.mark.parametrize(("degree", "sentence"), [("", "a name has moved"), ("many", "TP_PLUGIN_DEGREE must be")])
def test_a_refusal_ends_the_program_in_one_sentence(calls, monkeypatch, degree, sentence):
    def refuse():
        if not degree:
            raise TensorParallelError("a name has moved")

    monkeypatch.setattr(tp_plugin, "register", refuse)
    monkeypatch.setenv("TP_PLUGIN_DEGREE", degree)
    with pytest.raises(SystemExit, match=f"^tp_plugin: {sentence}"):
        startup._register()
    assert calls == []


def test_exec_gives_the_command_its_variables(monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    started = []
    monkeypatch.setattr(os, "execvp", lambda name, words: started.append((name, words)))
    main(["exec", "--degree", "2", "trl", "sft", "--config", "sft.yaml", "--degree", "5"])
    assert started == [("trl", ["trl", "sft", "--config", "sft.yaml", "--degree", "5"])]
    assert (os.environ["TP_PLUGIN"], os.environ["TP_PLUGIN_DEGREE"]) == ("1", "2")


@pytest.mark.parametrize("words", [[], ["no-such-program", "sft"]])
def test_exec_of_nothing_is_an_error(monkeypatch, capsys, words):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert main(["exec", *words]) == 2
    assert capsys.readouterr().err.startswith("tp-plugin exec: ")


def test_the_line_of_the_wheel_is_idle_without_the_variable():
    """Python's own reading of the line: nothing of ours is imported, or the hook waits."""
    line = Path(ROOT, "tp_plugin_startup.pth").read_text()
    report = "; import sys; print([type(f).__name__ for f in sys.meta_path], 'tp_plugin' in sys.modules)"
    said = {}
    for value in (None, "1"):
        env = {name: text for name, text in os.environ.items() if name != "TP_PLUGIN"} | {"PYTHONPATH": str(ROOT)}
        env |= {} if value is None else {"TP_PLUGIN": value}
        command = [sys.executable, "-S", "-c", line.strip() + report]
        said[value] = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert "BetweenImports" not in said[None]
    assert said[None].endswith("False\n")
    assert "BetweenImports" in said["1"]


REGISTERED = """
import inspect
import deepspeed
from tp_plugin.integrations.import_hooks import waiting
once = deepspeed.initialize.__wrapped__
print("patched once:", not hasattr(once, "__wrapped__") and inspect.isfunction(once), waiting())
"""


@pytest.mark.parametrize("way", ["-m tp_plugin.run", "register()"])
def test_a_program_that_registers_by_itself_is_registered_once(tmp_path, way):
    first = "" if way.startswith("-m") else "import tp_plugin; tp_plugin.register()"
    (tmp_path / "train.py").write_text(first + REGISTERED)
    line = Path(ROOT, "tp_plugin_startup.pth").read_text()
    start = f"{line}; import runpy, sys; sys.argv = sys.argv[1:]; "
    run_it = "runpy.run_module('tp_plugin.run', run_name='__main__')" if way.startswith("-m") else ""
    start += run_it or "runpy.run_path(sys.argv[0], run_name='__main__')"
    script = [*(["tp_plugin.run"] if run_it else []), str(tmp_path / "train.py")]
    env = os.environ | {"PYTHONPATH": str(ROOT), "TP_PLUGIN": "1", "RANK": "0", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", start.replace("\n", ""), *script]
    assert "patched once: True []" in output_of(command, env)
