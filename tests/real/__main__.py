"""LoRA on SmolLM2 by TRL, tensor parallel and in one process: the losses side by side, and texts before and after.

make real
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.real.python_docs import chats, write_chats
from tests.real.weights import Unavailable, weights
from tests.support.ranks import ROOT

OUTPUTS = ROOT / "outputs" / "real"
ROWS, GLOBAL_BATCH, TP, DP = 640, 8, 2, 2
SCRIPT = "examples/sft_trl.py"
QUESTIONS = [row["messages"][0]["content"] for row in chats(ROWS + 2)[ROWS:]]
"""Of rows that nothing was trained on."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.real", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    try:
        model = weights()["smollm2"]
    except Unavailable as reason:
        raise SystemExit(f"NOT RUN: {reason}") from None
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    write_chats(OUTPUTS / "chats.jsonl", ROWS)
    sharded = ["-m", "accelerate.commands.launch", "--config_file", "recipes/quickstart/accelerate.yaml"]
    runs = {
        f"tp {TP} x dp {DP}, ZeRO-1": run("sharded", [*sharded, "-m", "tp_plugin.run", SCRIPT], model, steps, DP),
        "one process": run("one", [SCRIPT, "--use_cpu", "true"], model, steps, 1),
    }
    print(table(runs))
    print(texts(model))


def run(name: str, command: list[str], model: Path, steps: int, dp: int) -> dict[str, Any]:
    """Train, and return what Trainer logged: {"seconds", "log"}."""
    out = OUTPUTS / name
    options = {
        "model": model, "data": OUTPUTS / "chats.jsonl", "held_out": 0.1, "lora_rank": 16, "output_dir": out,
        "max_steps": steps, "per_device_train_batch_size": GLOBAL_BATCH // dp, "logging_steps": max(1, steps // 8),
        "per_device_eval_batch_size": GLOBAL_BATCH // DP, "learning_rate": 5e-4, "eval_strategy": "no",
        "eval_on_start": True, "save_strategy": "no", "report_to": "none", "bf16": False,
    }  # fmt: skip
    words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    threads = {"OMP_NUM_THREADS": "1"} if dp > 1 else {}
    started = time.monotonic()
    subprocess.run([sys.executable, *command, *words], cwd=ROOT, check=True, env=os.environ | threads)
    seconds = time.monotonic() - started
    return {"seconds": seconds, "log": json.loads((out / "trainer_state.json").read_text())["log_history"]}


def table(runs: dict[str, dict[str, Any]]) -> str:
    """A row for each logged step, a column for each run."""
    lines = ["| | " + " | ".join(runs) + " |", "|---|" + "---|" * len(runs)]
    logs = [run["log"] for run in runs.values()]
    for entries in zip(*logs, strict=True):
        key = next((key for key in ("eval_loss", "loss") if key in entries[0]), None)
        if key is None:
            continue
        what = "held-out loss" if key == "eval_loss" else "loss"
        lines.append(f"| {what}, step {entries[0]['step']} | " + " | ".join(f"{e[key]:.5f}" for e in entries) + " |")
    return "\n".join(lines)


def texts(model: Path) -> str:
    """Greedy answers of the base model and of both adapters, by plain transformers and PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    found: dict[str, list[str]] = {}
    for name in ("before", "sharded", "one"):
        made = AutoModelForCausalLM.from_pretrained(model)
        if name != "before":
            made = PeftModel.from_pretrained(made, OUTPUTS / name)
        found[name] = [answer(made.eval(), tokenizer, question) for question in QUESTIONS]
    lines = []
    for number, question in enumerate(QUESTIONS):
        lines += [f"\n{question}", f"  before: {found['before'][number]}", f"  after:  {found['sharded'][number]}"]
        same = found["sharded"][number] == found["one"][number]
        lines += ["  one process: the same" if same else f"  one process: {found['one'][number]}"]
    return "\n".join(lines)


def answer(model: Any, tokenizer: Any, question: str) -> str:
    message = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**ids, max_new_tokens=48, do_sample=False)
    return " ".join(tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).split())


if __name__ == "__main__":
    main()
