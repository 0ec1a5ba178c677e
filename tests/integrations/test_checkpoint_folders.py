"""Which checkpoint is the newest whole one."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from tests.support.stored import stored
from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.checkpoint_folders import LATEST_GOOD, checkpoints_in, newest_whole
from tp_plugin.launch import finetune
from tp_plugin.launch.checkpoint import found
from tp_plugin.layout import ShardLayout
from tp_plugin.weights.fragments import damage_of
from tp_plugin.weights.manifest import FILE, Manifest


def checkpoint(path: Path, step: int) -> Path:
    path.mkdir(parents=True)
    stored(path, torch.randn(8, 4), ShardLayout.even((8, 4), 0, 2), [0.5])
    (path / FILE).write_bytes(dataclasses.replace(Manifest.load(path), step=step).dump())
    assert damage_of(path) is None
    return path


def trainer(folder: Path, step: int, *, complete: bool = True) -> Path:
    """As HF Trainer leaves it: its own state comes last."""
    path = checkpoint(folder / f"checkpoint-{step}" / f"global_step{step}", step)
    for name in ("training_args.bin", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"):
        torch.save({"state": torch.arange(9)}, path.parent / name)
    if complete:
        (path.parent / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


def truncate(path: Path) -> None:
    os.truncate(path / "rank_1_0.safetensors", 90)


def test_by_step_and_not_by_name(tmp_path):
    paths = [checkpoint(tmp_path / f"global_step{step}", step) for step in (9, 10, 2)]
    assert checkpoints_in(tmp_path) == [paths[1], paths[0], paths[2]]
    truncate(paths[1])
    assert newest_whole(tmp_path) == paths[0]


def test_a_trainers_unfinished_checkpoint_does_not_count(tmp_path):
    whole, damaged = trainer(tmp_path, 2), trainer(tmp_path, 4)
    trainer(tmp_path, 6, complete=False)
    truncate(damaged)
    (tmp_path / "checkpoint-8").mkdir()
    assert newest_whole(tmp_path) == whole
    assert newest_whole(damaged.parent) == whole, "looked for beside it"


SPOILT = {
    "rng_state_1.pth cut": lambda path: os.truncate(path / "rng_state_1.pth", 700),
    "scheduler.pt empty": lambda path: (path / "scheduler.pt").write_bytes(b""),
    "scheduler.pt changed": lambda path: change(path / "scheduler.pt", torch.arange(9).numpy().tobytes()),
    "trainer_state.json cut": lambda path: (path / "trainer_state.json").write_text('{"global_step"'),
    "trainer_state.json without a step": lambda path: (path / "trainer_state.json").write_text("{}"),
    "trainer_state.json not an object": lambda path: (path / "trainer_state.json").write_text("4"),
    "trainer_state.json of another step": lambda path: (path / "trainer_state.json").write_text('{"global_step": 3}'),
}


def change(path: Path, content: bytes) -> None:
    assert path.read_bytes().count(content) == 1
    path.write_bytes(path.read_bytes().replace(content, content[::-1]))


@pytest.mark.parametrize("name", SPOILT)
def test_neither_does_one_whose_trainer_files_are_damaged(tmp_path, name):
    whole, newer = trainer(tmp_path, 2), trainer(tmp_path, 4)
    assert newest_whole(tmp_path) == newer
    SPOILT[name](newer.parent)
    assert newest_whole(tmp_path) == whole
    assert newest_whole(newer.parent) == newer, "asked for by name: ours is whole"


def test_a_loop_of_ones_own_leaves_no_trainer_files(tmp_path):
    paths = [checkpoint(tmp_path / "own" / f"checkpoint-{step}" / "pytorch_model", step) for step in (9, 10)]
    assert newest_whole(tmp_path / "own") == paths[1]
    assert newest_whole(paths[0].parent) == paths[1]


def test_accelerates_numbered_states(tmp_path):
    paths = [checkpoint(tmp_path / "checkpoints" / f"checkpoint_{n}" / "pytorch_model", n + 9) for n in (0, 1, 10)]
    for folder in (tmp_path, tmp_path / "checkpoints", paths[0].parent):
        assert checkpoints_in(folder) == paths[::-1]
    truncate(paths[2])
    assert newest_whole(paths[2].parent) == paths[1]


def test_what_a_killed_job_was_writing_is_never_offered(tmp_path):
    whole = checkpoint(tmp_path / "global_step1", 1)
    checkpoint(tmp_path / ".tp_plugin-writing-global_step1-01234567", 2)
    checkpoint(tmp_path / ".tp_plugin-writing-global_step1-01234567-replaced", 3)
    assert checkpoints_in(tmp_path) == [whole]


@pytest.mark.parametrize("folder", [".", "checkpoint-4"])
def test_what_was_moved_aside_comes_back(tmp_path, folder):
    aside = checkpoint(tmp_path / folder / ".tp_plugin-writing-global-step-4-01234567-replaced", 4)
    checkpoint(aside.with_name(".tp_plugin-writing-global-step-4-01234567"), 5)
    assert newest_whole(tmp_path) == tmp_path / folder / "global-step-4"
    assert damage_of(tmp_path / folder / "global-step-4") is None


def test_a_directory_without_checkpoints_is_refused(tmp_path):
    assert newest_whole(tmp_path) is None
    assert newest_whole(tmp_path / "missing") is None
    with pytest.raises(TensorParallelError, match="there is no whole checkpoint of tp_plugin's at"):
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
    assert "names a file outside of it" in (damage_of(path) or "")


# ---- finetune --resume -----------------------------------------------------------------------------------------------


class Recipe:
    def __init__(self, folder: Path) -> None:
        self.output_dir = str(folder)


def test_finetune_resumes_the_newest_whole_one_or_begins(tmp_path, capsys):
    assert finetune._resumed(Recipe(tmp_path), LATEST_GOOD) is None
    assert "training starts from step 0" in capsys.readouterr().out
    whole = trainer(tmp_path, 2)
    trainer(tmp_path, 4, complete=False)
    os.truncate(trainer(tmp_path, 6).parent / "rng_state_1.pth", 700)
    checkpoint(tmp_path / "checkpoint-8" / "global_step8", 8)  # of a loop that was not Trainer's
    checkpoint(tmp_path / "global_step9", 9)
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
