"""Real weights, real tokenizers and real text: sharded as in one process.

Random weights have no outliers, and a random model's next token is decided by rounding.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.real import generate
from tests.real.python_docs import write_chats
from tests.real.weights import directory
from tests.support.launching import alone, deepspeed_config, launch
from tests.support.ranks import on_ranks

TP, ROWS = 2, 8
SFT, CLASSIFY = "examples/sft_trl.py", "tests/real/classify.py"
# name -> (script, model, data-parallel ranks, ZeRO stage, options)
RUNS: dict[str, tuple[str, str, int, int, dict[str, Any]]] = {
    "full": (SFT, "smollm2_6", 1, 1, {"max_steps": 2, "learning_rate": 1e-4}),
    "LoRA": (SFT, "smollm2_6", 2, 2, {"max_steps": 2, "learning_rate": 1e-3, "lora_rank": 8}),
    # Trainer multiplies losses of classes by the data-parallel ranks otherwise, sharded or not
    "classes": (CLASSIFY, "minilm", 2, 1, {"max_steps": 16, "learning_rate": 4e-4, "dropout": 0.0,
                                           "average_tokens_across_devices": False}),
}  # fmt: skip


def command(folder: Path, name: str, out: str, dp: int) -> list[str]:
    script, model, _, _, own = RUNS[name]
    options = {
        "model": directory(model), "output_dir": folder / out, "logging_steps": 1, "report_to": "none",
        "per_device_train_batch_size": ROWS // dp, "per_device_eval_batch_size": 16, "save_strategy": "no",
        "disable_tqdm": True, "lr_scheduler_type": "constant", "adam_epsilon": 1e-6, "bf16": False, **own,
    }  # fmt: skip
    if script == SFT:
        options |= {"data": folder / "chats.jsonl", "max_length": 64}
    return [script, *(str(word) for key, value in options.items() for word in (f"--{key}", value))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what one process has made of every run."""
    made = tmp_path_factory.mktemp("real")
    write_chats(made / "chats.jsonl", 64)
    alone(*([*command(made, name, f"{name} alone", 1), "--use_cpu", "true"] for name in RUNS))
    return made


@functools.cache
def launched(folder: Path, name: str) -> str:
    """Run once however many tests ask."""
    configs = folder / f"{name} configs"
    configs.mkdir()
    _, _, dp, stage, _ = RUNS[name]
    return launch(configs, TP * dp, deepspeed_config(stage), command(folder, name, name, dp))


def logged(folder: Path, out: str) -> list[dict[str, float]]:
    return json.loads((folder / out / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("name", RUNS)
def test_a_training_of_real_weights_equals_one_process(folder, name):
    launched(folder, name)
    steps = [(ours, truth) for ours, truth in zip(logged(folder, name), logged(folder, f"{name} alone"), strict=True)]
    compared = [(ours, truth) for ours, truth in steps if "grad_norm" in truth]
    assert len(compared) == RUNS[name][4]["max_steps"]
    for ours, truth in compared:
        assert ours["loss"] == pytest.approx(truth["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(truth["grad_norm"], rel=1e-4)
    file = "adapter_model.safetensors" if name == "LoRA" else "model.safetensors"
    ours, truth = (load_file(folder / out / file) for out in (name, f"{name} alone"))
    assert ours.keys() == truth.keys()
    for key, expected in truth.items():
        limit = 1e-2 if key.endswith("key.bias") else 1e-4  # softmax ignores it: its gradient is rounding
        assert (ours[key] - expected).norm() <= limit * expected.norm(), key


def test_a_classifier_has_the_accuracy_and_f1_of_one_process_and_learns(folder):
    launched(folder, "classes")
    ours, truth = (json.loads((folder / out / "eval_results.json").read_text()) for out in ("classes", "classes alone"))
    for key in ("eval_accuracy", "eval_f1", "eval_rows"):
        assert ours[key] == truth[key]
    assert ours["eval_loss"] == pytest.approx(truth["eval_loss"], rel=1e-5)
    assert ours["eval_rows"] == 96
    assert ours["eval_accuracy"] >= 0.5, "of six packages"


def test_smollm2_answers_token_by_token_as_in_one_process():
    path = str(directory("smollm2"))
    (truth,) = on_ranks(1, generate.answers, path, 1)
    assert "Paris" in truth[1][0]
    for tokens, texts, scores in on_ranks(TP, generate.answers, path, TP):
        assert tokens == truth[0]
        assert texts == truth[1]
        assert torch.allclose(torch.tensor(scores), torch.tensor(truth[2]), atol=1e-3)
