"""Files written aside in a directory that holds others, and moved to their places."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from tp_plugin.errors import TensorParallelError
from tp_plugin.weights.staging import Staging

NAMES = ("adapter_model.safetensors", "adapter_config.json", "README.md")


def written(directory, content, names=NAMES, subfolder="."):
    with Staging(directory) as staging:
        (staging.path / subfolder).mkdir(exist_ok=True)
        for name in names:
            (staging.path / subfolder / name).write_text(content)
        return staging.move_in()


def contents(directory):
    return {path.relative_to(directory).as_posix(): path.read_text() for path in directory.rglob("*") if path.is_file()}


def test_what_is_there_stays_until_everything_is_written(tmp_path):
    directory = tmp_path / "deep" / "model"
    assert written(directory, "old", subfolder="other") == sorted(f"other/{name}" for name in NAMES)
    with Staging(directory) as staging:
        (staging.path / "other").mkdir()
        (staging.path / "other" / "README.md").write_text("new")
        assert (directory / "other" / "README.md").read_text() == "old"
        staging.move_in()
    assert contents(directory) == {f"other/{name}": "new" if name == "README.md" else "old" for name in NAMES}


def test_a_failure_before_the_first_move_changes_nothing(tmp_path):
    written(tmp_path, "old")
    before = contents(tmp_path)

    def full():
        with Staging(tmp_path) as staging:
            (staging.path / "README.md").write_text("new")
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        full()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match=r"model\.safetensors"):
        written(tmp_path, "new", (*NAMES, "model.safetensors"))
    assert contents(tmp_path) == before


def test_a_failure_between_moves_keeps_the_rest_and_says_where(tmp_path, monkeypatch):
    written(tmp_path, "old")
    replace = os.replace

    def broken(source, target):
        if Path(target).name == "README.md":
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(TensorParallelError, match=r"halfway \(Input/output error\); move what .*\.moving-"):
        written(tmp_path, "new")
    monkeypatch.undo()
    (left,) = tmp_path.glob(".moving-*")
    assert contents(left) == {"README.md": "new", "adapter_config.json": "new"}
    assert not (tmp_path / "adapter_config.json").exists()  # new weights under the old config would load
    written(tmp_path, "newest")
    assert contents(tmp_path) == dict.fromkeys(NAMES, "newest")


def test_what_a_killed_job_left_goes_and_nothing_else(tmp_path):
    for name in (".saving-01234567", ".moving-01234567", ".saving-mine", "saving-01234567"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    with Staging(tmp_path):
        assert (tmp_path / ".moving-01234567").exists()  # until this save is in place, it may be all there is
    written(tmp_path, "new")
    assert sorted(os.listdir(tmp_path)) == sorted([".saving-mine", *NAMES, "saving-01234567"])


def save_slowly(directory, ready):
    with Staging(directory) as staging:
        (staging.path / "README.md").write_text("half")
        ready.set()
        signal.pause()


def test_what_another_job_is_writing_stays_until_that_job_is_gone(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    other = context.Process(target=save_slowly, args=(tmp_path, ready), daemon=True)
    other.start()
    assert ready.wait(60)
    written(tmp_path, "new")
    assert len(list(tmp_path.glob(".saving-*"))) == 1
    other.kill()
    other.join()
    written(tmp_path, "new")
    assert sorted(os.listdir(tmp_path)) == sorted(NAMES)


def test_a_folder_that_was_removed_under_us_is_said(tmp_path):
    """As another host may, where locks are not seen."""
    with Staging(tmp_path) as staging:
        staging.path.rmdir()
        staging.path.mkdir()
        with pytest.raises(OSError, match="another process removed"):
            staging.move_in()


def test_weights_come_first_and_configs_last(tmp_path, monkeypatch):
    moved, replace = [], os.replace

    def noted(source, target):
        moved.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", noted)
    written(tmp_path, "new", ("adapter_config.json", "model.safetensors.index.json", "model-1.safetensors", "a.md"))
    assert moved[0] == "model-1.safetensors"
    assert moved[-1] == "adapter_config.json"
