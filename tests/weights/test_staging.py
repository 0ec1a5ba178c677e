"""Files written aside in a directory that holds others, and moved to their places."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tp_plugin.weights.staging import move_in, staged


def test_what_is_there_stays_until_everything_is_written(tmp_path):
    directory = tmp_path / "deep" / "model"
    for content in ("old", "new"):
        with staged(directory) as staging:
            (staging / "card").mkdir()
            for name in ("config.json", "card/README.md"):
                (staging / name).write_text(content)
            assert content == "old" or (directory / "config.json").read_text() == "old"
            assert move_in(staging, directory) == ["card/README.md", "config.json"]
    assert sorted(os.listdir(directory)) == ["card", "config.json"]
    assert (directory / "card" / "README.md").read_text() == "new"


def test_a_failure_leaves_nothing_of_its_own(tmp_path):
    (tmp_path / "config.json").write_text("old")

    def fail():
        with staged(tmp_path) as staging:
            (staging / "config.json").write_text("new")
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        fail()
    assert os.listdir(tmp_path) == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "old"


def test_what_a_killed_job_left_goes_and_nothing_else(tmp_path):
    for name in (".saving-01234567", ".saving-mine", "saving-01234567"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    with staged(tmp_path):
        pass
    assert sorted(os.listdir(tmp_path)) == [".saving-mine", "saving-01234567"]


def test_weights_come_first_and_configs_last(tmp_path, monkeypatch):
    """Who loads while files are moved finds no config, or everything."""
    moved, replace = [], os.replace

    def noted(source, target):
        moved.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", noted)
    with staged(tmp_path) as staging:
        for name in ("adapter_config.json", "model.safetensors.index.json", "model-1.safetensors", "README.md"):
            (staging / name).touch()
        move_in(staging, tmp_path)
    assert moved[0] == "model-1.safetensors"
    assert moved[-1] == "adapter_config.json"
