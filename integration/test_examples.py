"""The scripts of ``examples/``, run as they are: in one plain process, and on four ranks as tp 2 x dp 2."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support import chat, tiny
from tests.support.launching import alone, deepspeed_config, launch
from tests.support.ranks import ROOT

TOLD_BY_CLOCKS = ("runtime", "per_second")
COMMON = ["--logging_steps", "1", "--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no",
          "--learning_rate", "1e-2", "--adam_epsilon", "1e-4", "--max_grad_norm", "0.5", "--seed", "3"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with its tokenizer, and texts of words it knows."""
    made = tmp_path_factory.mktemp("examples")
    chat.tokenizer().save_pretrained(made / "model")
    model = tiny.model()
    model.config.pad_token_id, model.config.eos_token_id = 0, 3
    model.save_pretrained(made / "model")
    draw = random.Random(0)

    def lines(name: str, rows: list[dict]) -> None:
        (made / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    lines("train.jsonl", [{"text": chat.words(draw, 10, 60)} for _ in range(24)])
    lines("held_out.jsonl", [{"text": chat.words(draw, 40, 40)} for _ in range(6)])
    lines("chats.jsonl", chat.rows("chat", 32))
    return made


def run(folder: Path, name: str, script: str, arguments: list[str], rows: int) -> dict[str, dict[str, Any]]:
    """``plain`` and ``sharded``: the log, and what the script printed last; both read ``rows`` rows a step."""
    found = {}
    for how in ("plain", "sharded"):
        out = folder / name / how
        out.mkdir(parents=True)
        batch = ["--per_device_train_batch_size", str(rows if how == "plain" else rows // 2),
                 "--per_device_eval_batch_size", str(rows if how == "plain" else rows // 2)]  # fmt: skip
        command = [f"{ROOT}/examples/{script}", *arguments, *COMMON, *batch, "--output_dir", str(out)]
        printed = alone(command) if how == "plain" else launch(out, 4, deepspeed_config(1), command)
        state = json.loads((out / "trainer_state.json").read_text())
        found[how] = {"log": state["log_history"], "printed": printed, "out": out}
    return found


def test_run_clm(folder):
    arguments = ["--model", f"{folder}/model", "--train_file", f"{folder}/train.jsonl", "--block_size", "12",
                 "--validation_file", f"{folder}/held_out.jsonl", "--max_steps", "4", "--prompt", "w30 w54 w6",
                 "--max_new_tokens", "5"]  # fmt: skip
    found = run(folder, "clm", "run_clm.py", arguments, rows=4)
    assert_same_log(found)
    assert_same_weights(found, AutoModelForCausalLM.from_pretrained)
    results = [json.loads((one["out"] / "eval_results.json").read_text()) for one in found.values()]
    assert_same_numbers(*results)
    assert results[0].keys() >= {"eval_loss", "eval_perplexity", "eval_accuracy"}
    written = [line for line in found["plain"]["printed"].splitlines() if line.startswith("w30 w54 w6")]
    assert len(written) == 1
    assert found["sharded"]["printed"].count(written[0]) == 1


@pytest.mark.parametrize("rank", [pytest.param(0, id="full", marks=pytest.mark.slow), pytest.param(4, id="lora")])
def test_sft_trl(folder, rank):
    arguments = ["--model", f"{folder}/model", "--data", f"{folder}/chats.jsonl", "--held_out", "0.25",
                 "--max_steps", "4", "--bf16", "false", "--lora_rank", str(rank)]  # fmt: skip
    found = run(folder, f"sft {rank}", "sft_trl.py", arguments, rows=4)
    # the former counts padding, and replicas pad for themselves; the latter is TRL's mean of the replicas' means
    assert_same_log(found, but=("total_flos", "eval_loss"))
    evaluated = [next(e["eval_loss"] for e in one["log"] if "eval_loss" in e) for one in found.values()]
    assert evaluated[1] == pytest.approx(evaluated[0], rel=5e-3)
    keys = {key for entry in found["plain"]["log"] for key in entry}
    assert keys >= {"entropy", "mean_token_accuracy", "num_tokens", "eval_loss", "eval_mean_token_accuracy"}
    if not rank:
        assert_same_weights(found, AutoModelForCausalLM.from_pretrained)
        return
    theirs, ours = (load_file(one["out"] / "adapter_model.safetensors") for one in found.values())
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= 1e-4 * tensor.norm(), name
    assert all(tensor.norm() > 0 for name, tensor in theirs.items() if "lora_B" in name)


def assert_same_log(found: dict[str, dict], but: tuple[str, ...] = ()) -> None:
    plain, sharded = (found[how]["log"] for how in ("plain", "sharded"))
    assert len(plain) == len(sharded)
    for theirs, ours in zip(plain, sharded, strict=True):
        assert_same_numbers(theirs, ours, but)
    losses = [entry["loss"] for entry in plain if "loss" in entry]
    assert len(losses) == 4
    assert len(set(losses)) == 4


def assert_same_numbers(theirs: dict[str, float], ours: dict[str, float], but: tuple[str, ...] = ()) -> None:
    assert theirs.keys() == ours.keys()
    for key, value in theirs.items():
        if key not in but and not any(part in key for part in TOLD_BY_CLOCKS):
            assert math.isclose(ours[key], value, rel_tol=2e-5, abs_tol=1e-7), f"{key}: {ours[key]}, not {value}"


def assert_same_weights(found: dict[str, dict], load: Callable) -> None:
    theirs, ours = (dict(load(found[how]["out"]).named_parameters()) for how in ("plain", "sharded"))
    start = dict(tiny.model().named_parameters())
    assert theirs.keys() == ours.keys() == start.keys()
    for name, parameter in theirs.items():
        update = (parameter - start[name]).norm()
        assert update > 0
        error = (ours[name] - parameter).norm() / update
        assert error <= 1e-4, f"{name}: the update is off by {error:.1e}"
