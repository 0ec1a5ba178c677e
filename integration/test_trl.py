"""TRL's own scripts through ``accelerate launch -m tp_plugin.run -m trl.scripts...``, on CPU ranks.

The recipes are run as they are but for their sizes: another model, another data set, float32, a few steps. What they
save is compared with what the same script leaves in one process, loaded by plain transformers and PEFT, and generates.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import chat, trl_runs
from tests.support.launching import accelerate_launch, alone, deepspeed_config, launch
from tests.support.ranks import ROOT

RECIPES = ROOT / "recipes"
# name -> (script, recipe or None, model family, form of the data, ranks, ZeRO stage)
RUNS = {
    "llama sft": ("sft", "llama-3.1-8b/sft_lora.yaml", "Llama", "prompt-completion", 2, 1),
    "qwen3 sft": ("sft", "qwen3-8b/sft_lora.yaml", "Qwen3", "chat", 2, 2),
    "qwen3 dpo": ("dpo", "qwen3-8b/dpo_lora.yaml", "Qwen3", "chat-preference", 2, 3),
    "dpo with a reference": ("dpo", None, "Llama", "preference", 2, 3),
    "reward": ("reward", None, "Qwen3", "chat-preference", 2, 1),
}
TP, ROWS = 2, 4
LAUNCHED = "qwen3 sft"  # by accelerate launch every time, the others in forked ranks


@functools.cache
def prepared(folder: Path) -> Path:
    """Small models, with a tokenizer, and data sets of every form, on disk."""
    for family in {run[2] for run in RUNS.values()}:
        trl_runs.model_of("sft", True, family).save_pretrained(folder / family)
        trl_runs.model_of("reward", True, family).save_pretrained(folder / f"{family}-reward")
        for name in (family, f"{family}-reward"):
            chat.tokenizer().save_pretrained(folder / name)
    for form in {run[3] for run in RUNS.values()}:
        (folder / form).mkdir()
        rows = "\n".join(json.dumps(row) for row in chat.rows(form, 24))
        (folder / form / "train.jsonl").write_text(rows)
    return folder


def command(name: str, folder: Path, out: str, dp: int) -> list[str]:
    """The module and its arguments: a recipe with its sizes overridden."""
    script, recipe, family, form, *_ = RUNS[name]
    model = folder / (f"{family}-reward" if script == "reward" else family)
    options = {
        "model_name_or_path": model, "dtype": "float32", "dataset_name": folder / form, "output_dir": folder / out,
        "per_device_train_batch_size": ROWS // dp, "gradient_accumulation_steps": 1, "max_steps": 3, "bf16": False,
        "logging_steps": 1, "learning_rate": 1e-2, "adam_epsilon": 1e-4, "warmup_steps": 0, "report_to": "none",
        "lr_scheduler_type": "constant", "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    config = [] if recipe is None else ["--config", str(RECIPES / recipe)]
    return [f"trl.scripts.{script}", *config, *(str(x) for key, value in options.items() for x in (f"--{key}", value))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what one process has made of every run."""
    made = prepared(tmp_path_factory.mktemp("trl"))
    alone(*(["-m", *command(name, made, f"{name} alone", 1), "--use_cpu", "true"] for name in RUNS))
    return made


@functools.cache
def launched(folder: Path, name: str) -> str:
    """The output of one run, once however many tests ask."""
    ranks, stage = RUNS[name][4:]
    configs = folder / f"{name} configs"
    configs.mkdir(exist_ok=True)
    start = accelerate_launch if name == LAUNCHED else launch
    return start(configs, ranks, deepspeed_config(stage), ["-m", *command(name, folder, name, ranks // TP)])


@pytest.mark.parametrize("name", RUNS)
def test_a_script_of_trl_gives_what_one_process_gives(folder, name):
    output = launched(folder, name)
    assert output.count("'loss'") == 3, output[-4000:]
    file = "adapter_model.safetensors" if RUNS[name][1] else "model.safetensors"
    ours, truth = (load_file(folder / out / file) for out in (name, f"{name} alone"))
    assert ours.keys() == truth.keys()
    for key, expected in truth.items():
        assert ours[key].shape == expected.shape
        assert (ours[key] - expected).norm() <= 1e-4 * expected.norm(), key


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run[1]])
def test_what_was_saved_is_loaded_by_plain_peft_and_generates(folder, name):
    from peft import AutoPeftModelForCausalLM

    launched(folder, name)
    inputs = chat.tokenizer()("w6 w30 w54", return_tensors="pt")["input_ids"]
    found = []
    for out in (name, f"{name} alone"):
        model = AutoPeftModelForCausalLM.from_pretrained(folder / out).eval()
        found.append(model.generate(input_ids=inputs, max_new_tokens=8, do_sample=False))
    assert found[0].shape[1] > inputs.shape[1]
    assert torch.equal(*found)
