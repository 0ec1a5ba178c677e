"""axolotl's last step, of a module with its function's name: axolotl itself runs in ``make test-clients``."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import tp_plugin
from tests.support import tiny
from tests.support.ranks import errors_on_ranks, on_ranks
from tests.support.trainer_cases import config_of
from tp_plugin.integrations.axolotl import ROOM
from tp_plugin.integrations.features import AXOLOTL, forget_moved

TRAIN = """
def save_trained_model(cfg, trainer, model):
    if cfg.local_rank == 0:
        model.save_pretrained(cfg.output_dir)
"""
ROWS = [{"input_ids": row, "labels": row} for row in torch.randint(2, 100, (8, 12), generator=torch.manual_seed(0))]


def program(folder: Path, source: str = TRAIN) -> None:
    """Put a package of axolotl's name on the path."""
    (folder / "axolotl").mkdir()
    (folder / "axolotl" / "__init__.py").touch()
    (folder / "axolotl" / "train.py").write_text(source)


def saved(folder: str, sharded: bool, **options: bool) -> dict[str, torch.Tensor]:
    """Weights after two steps, as the program saves them."""
    sys.path.insert(0, folder)
    if sharded:
        tp_plugin.register()
    from axolotl.train import save_trained_model

    how = {"deepspeed": config_of(1)} if sharded else {"use_cpu": True}
    args = TrainingArguments(
        f"{folder}/out", per_device_train_batch_size=4, max_steps=2, report_to="none", save_strategy="no",
        disable_tqdm=True, learning_rate=1e-2, **how,
    )  # fmt: skip
    trainer = Trainer(tiny.model(), args, train_dataset=ROWS)
    trainer.train()
    cfg = types.SimpleNamespace(local_rank=max(args.local_process_index, 0), output_dir=f"{folder}/model", **options)
    save_trained_model(cfg, trainer, trainer.model)
    return AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32).state_dict()


def test_the_whole_model_is_saved(tmp_path):
    program(tmp_path)
    expected = on_ranks(1, saved, str(tmp_path), False)[0]
    for found in on_ranks(2, saved, str(tmp_path), True, env={"ACCELERATE_USE_DEEPSPEED": "true"}, timeout_s=60):
        for name, tensor in expected.items():
            assert (found[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


def test_options_that_change_full_weights_are_refused(tmp_path):
    program(tmp_path)
    env = {"ACCELERATE_USE_DEEPSPEED": "true"}
    for error in errors_on_ranks(2, saved, str(tmp_path), True, env=env, relora=True):
        assert error.startswith("axolotl's relora changes full weights")


@pytest.mark.parametrize(
    ("source", "said"),
    [("", "is gone"), ("def save_trained_model(model): ...", "takes (model), not (cfg, trainer, model)")],
)
def test_a_version_whose_function_moved_loses_this_feature(tmp_path, monkeypatch, source, said):
    program(tmp_path, source)
    monkeypatch.syspath_prepend(tmp_path)
    tp_plugin.unregister()
    try:
        ROOM.install()
        importlib.import_module("axolotl.train")
        assert said in (AXOLOTL.broken or "")
        assert AXOLOTL.broken.startswith("tp_plugin refuses saving what axolotl trained with axolotl ")
    finally:
        ROOM.uninstall()
        for name in ("axolotl", "axolotl.train"):
            sys.modules.pop(name, None)
        forget_moved("axolotl")
