"""Which checkpoint is the newest whole one."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from tests.weights.test_fragments import stored
from tp_plugin.errors import TensorParallelError
from tp_plugin.launch import finetune
from tp_plugin.launch.checkpoint import found
from tp_plugin.layout import ShardLayout
from tp_plugin.weights.manifest import FILE, Manifest
from tp_plugin.weights.whole import LATEST_GOOD, candidates, examine, newest_whole


def checkpoint(path: Path, step: int) -> Path:
    path.mkdir(parents=True)
    stored(path, torch.randn(8, 4), ShardLayout.even((8, 4), 0, 2), [0.5])
    (path / FILE).write_bytes(dataclasses.replace(Manifest.load(path), step=step).dump())
    assert examine(path) is None
    return path


def trainer(folder: Path, step: int, *, complete: bool = True) -> Path:
    """As HF Trainer leaves it: its own state comes last."""
    path = checkpoint(folder / f"checkpoint-{step}" / f"global_step{step}", step)
    if complete:
        (path.parent / "trainer_state.json").write_text("{}")
    return path


def truncate(path: Path) -> None:
    os.truncate(path / "rank_1_0.safetensors", 90)


def test_by_step_and_not_by_name(tmp_path):
    paths = [checkpoint(tmp_path / f"global_step{step}", step) for step in (9, 10, 2)]
    assert candidates(tmp_path) == [paths[1], paths[0], paths[2]]
    truncate(paths[1])
    assert newest_whole(tmp_path) == paths[0]


def test_a_trainers_unfinished_checkpoint_does_not_count(tmp_path):
    whole, damaged = trainer(tmp_path, 2), trainer(tmp_path, 4)
    trainer(tmp_path, 6, complete=False)
    truncate(damaged)
    (tmp_path / "checkpoint-8").mkdir()
    assert newest_whole(tmp_path) == whole
    assert newest_whole(damaged.parent) == whole, "looked for beside it"


def test_none_is_none(tmp_path):
    assert newest_whole(tmp_path) is None
    assert newest_whole(tmp_path / "missing") is None
    with pytest.raises(TensorParallelError, match="there is no checkpoint of tp_plugin's at"):
        found(tmp_path)


def test_a_path_means_a_checkpoint(tmp_path):
    older, newer = (checkpoint(tmp_path / f"global_step{step}", step) for step in (1, 2))
    assert found(older) == older
    assert found(tmp_path) == newer
    (tmp_path / "latest").write_text("global_step1")
    assert found(tmp_path) == older


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "sub/x.safetensors"])
def test_a_manifest_cannot_name_files_elsewhere(tmp_path, name):
    path = checkpoint(tmp_path / "one", 1)
    manifest = Manifest.load(path)
    (path / FILE).write_bytes(dataclasses.replace(manifest, files={name: next(iter(manifest.files.values()))}).dump())
    assert "names a file outside of it" in (examine(path) or "")


# ---- finetune --resume -----------------------------------------------------------------------------------------------


class Recipe:
    def __init__(self, folder: Path) -> None:
        self.output_dir = str(folder)


def test_finetune_resumes_the_newest_whole_one_or_begins(tmp_path, capsys):
    assert finetune._resumed(Recipe(tmp_path), LATEST_GOOD) is None
    assert "training begins anew" in capsys.readouterr().out
    whole = trainer(tmp_path, 2)
    trainer(tmp_path, 4, complete=False)
    assert finetune._resumed(Recipe(tmp_path), LATEST_GOOD) == str(whole.parent)
    assert finetune._resumed(Recipe(tmp_path), "checkpoint-7") == "checkpoint-7"
    assert finetune._resumed(Recipe(tmp_path), None) is None


def test_finetunes_command_line_has_it(monkeypatch):
    asked = []
    monkeypatch.setattr(finetune, "load_recipe", lambda path, overrides: (path, list(overrides)))
    monkeypatch.setattr(finetune, "finetune", lambda recipe, resume=None: asked.append((recipe, resume)))
    finetune.main(["r.yaml", "--resume", "latest-good", "seed=1"])
    finetune.main(["r.yaml"])
    assert asked == [(("r.yaml", ["seed=1"]), "latest-good"), (("r.yaml", []), None)]
