"""Examples of the README and docs/usage.md: their code, a directory with what they expect, a way to run them."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import transformers

from tests.support.launching import output_of
from tests.support.ranks import ROOT
from tp_plugin.launch.model import build_model, build_tokenizer

DOCS = (ROOT / "README.md").read_text() + (ROOT / "docs/usage.md").read_text()
BLOCKS = dict(re.findall(r"<!-- run: (\w+) -->\n```\w+\n(.*?)```", DOCS, re.S))
TEXTS = [f"{n} times {n} is {n * n}, as everybody knows. The quick brown fox jumps over it." for n in range(200)]
SHARDED = "tp=2 dp=1 ZeRO-1, 7/7 linears sharded"
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def prepare(tmp_path: Path) -> Path:
    """Fill a directory with what the examples expect: ``tiny`` in place of the 8B model, and two CPU processes."""
    tmp_path.mkdir(exist_ok=True)
    build_tokenizer(str(tmp_path / "tiny"), 301, TEXTS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tiny")
    build_model(str(tmp_path / "tiny"), LLAMA, tokenizer, seed=0)
    (tmp_path / "my.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    config = (ROOT / "recipes/accelerate/tp2_zero1.yaml").read_text()
    (tmp_path / "cpu.yaml").write_text(config.replace("num_processes: 8", "num_processes: 2\nuse_cpu: true"))
    return tmp_path


def run(place: Path, *command: str, sharded: bool = True, environment: Path | None = None) -> str:
    """Run a command of the checkout's environment, or of the virtual environment given, in which alone it looks."""
    bin_folder = environment / "bin" if environment else Path(sys.executable).parent
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "" if environment else str(ROOT),
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
    }
    printed = output_of([str(bin_folder / command[0]), *command[1:]], env, cwd=place, timeout_s=300)
    assert not sharded or SHARDED in printed
    return printed


def trl_script() -> str:
    """Return the README's script, for a tiny model and a CPU."""
    script = BLOCKS["trl"].replace("bf16=True", "bf16=False, learning_rate=1e-2").replace('"bfloat16"', '"float32"')
    return script.replace("Qwen/Qwen3-8B", "tiny")
