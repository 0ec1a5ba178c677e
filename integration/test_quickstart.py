"""``make quickstart`` as a user sees it, and the same recipe from the deepspeed launcher."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from tests.support.launching import launch_module, output_of
from tests.support.ranks import ROOT

RECIPE = yaml.safe_load((ROOT / "recipes/quickstart/train.yaml").read_text())
STEPS, SAVED = 40, 30
"""Steps that every-day tests run of the recipe's, and at which one they save: the loss falls most at the beginning."""
SUMMARY = re.compile(
    r"tp=2 dp=2 ZeRO-1, 28/28 linears sharded, embedding and head vocab-parallel, (\d+)% of the parameters per rank"
)


def launch(command: list[str], *, timeout_s: float = 500) -> str:
    """Everything a command of this environment printed; fails when the command does."""
    bin_folder = Path(sys.executable).parent
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    return output_of([str(bin_folder / command[0]), *command[1:]], env, timeout_s=timeout_s)


def quickstart_command() -> list[str]:
    """What the Makefile runs, word for word."""
    done = subprocess.run(["make", "--dry-run", "--silent", "quickstart"], cwd=ROOT, capture_output=True, text=True)
    (line,) = re.findall(r"OMP_NUM_THREADS=1 \S*/(accelerate launch (?:.|\n)*?train\.yaml)$", done.stdout, re.M)
    return shlex.split(line.replace("\\\n", " "))


def into(folder: Path) -> list[str]:
    return [f"output_dir={folder}", f"model.path={folder}/from"]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    short = [f"training.max_steps={STEPS}", f"training.save_steps={SAVED}"]
    return folder, launch([*quickstart_command(), *into(folder), *short])


def test_it_says_what_was_sharded_and_no_rank_holds_more_than_52_percent(quickstart):
    _, log = quickstart
    (percent,) = SUMMARY.findall(log)
    assert int(percent) <= 52
    assert RECIPE["tokenizer"]["build_vocab_size"] % 2, "the vocabulary is one that tp does not divide"


def test_the_loss_falls_from_about_ln_v(quickstart):
    _, log = quickstart
    assert_falls(log, STEPS, 1.2)
    assert "100%|" in log, "a progress bar"


@pytest.mark.slow
def test_the_loss_of_the_whole_recipe_falls_by_two_nats(tmp_path):
    assert_falls(launch([*quickstart_command(), *into(tmp_path)]), RECIPE["training"]["max_steps"], 2)


def assert_falls(log: str, steps: int, nats: float) -> None:
    line = rf"{steps} steps in \d+ s, loss ([\d.]+) -> ([\d.]+), held-out loss ([\d.]+) -> ([\d.]+)"
    (report,) = re.findall(line, log)
    first, last, first_held_out, last_held_out = map(float, report)
    uniform = math.log(RECIPE["tokenizer"]["build_vocab_size"])
    assert first == pytest.approx(uniform, abs=0.5)
    assert first_held_out == pytest.approx(uniform, abs=0.5)
    assert first - last >= nats
    assert first_held_out - last_held_out >= nats


def test_plain_transformers_loads_the_result_with_the_same_logits(quickstart):
    folder, log = quickstart
    (found,) = re.findall(
        r"plain transformers in one process: loss ([\d.]+), sharded ([\d.]+); "
        r"logits differ by at most ([\d.e+-]+) of ([\d.]+)",
        log,
    )
    plain, sharded, difference, largest = map(float, found)
    assert plain == pytest.approx(sharded, rel=1e-5)
    assert difference <= 1e-5 * largest
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.vocab_size == RECIPE["tokenizer"]["build_vocab_size"]
    assert model.config.use_cache, "switched off for training only"


def test_it_ends_with_a_sample_of_the_prompt_by_that_model(quickstart):
    folder, log = quickstart
    sample = log.split("a sample from it:\n")[1]
    assert sample.startswith(RECIPE["sample"]["prompt"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(sample)["input_ids"]) == sample


def test_the_recipe_resumes_from_its_newest_undamaged_checkpoint(tmp_path, quickstart):
    folder, log = quickstart
    for path in folder.glob("checkpoint-*"):
        shutil.copytree(path, tmp_path / path.name)
    (damaged,) = tmp_path.glob(f"checkpoint-{STEPS}/*/rank_00001.safetensors")
    os.truncate(damaged, 1000)
    job = ["recipes/quickstart/train.yaml", f"output_dir={tmp_path}", f"model.path={folder}/from"]
    job.append(f"training.max_steps={STEPS}")
    again = launch_module(4, "tp_plugin.finetune", [*job, "--resume", "latest-good"])
    assert SUMMARY.search(again)
    assert f"resumed a checkpoint of tp=2 dp=2 ZeRO-1 at tp=2 dp=2 ZeRO-1: step {SAVED}" in again
    assert losses(again) == losses(log)[-1:], "as if it had not stopped"
    one, other = (transformers.AutoModelForCausalLM.from_pretrained(where) for where in (folder, tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def losses(text: str) -> list[str]:
    return re.findall(r"'loss': '?([\d.]+)", text)
