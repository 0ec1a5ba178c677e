"""Examples of the README and docs/usage.md, run as they are but for the model, the learning rate and the devices.

On a CPU Trainer refuses bf16, so its two examples run in fp32 here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers

from tests.support import launching
from tests.support.examples import BLOCKS, DOCS, SHARDED, prepare, run, trl_script
from tests.support.launching import free_port
from tests.support.ranks import ROOT


@pytest.fixture
def place(tmp_path):
    return prepare(tmp_path)


def run_forked(place: Path, *command: str, config: str | None = None, sharded: bool = True) -> str:
    """:func:`run` on two forked ranks, started as by ``accelerate launch`` with ``config``, or by deepspeed."""
    if launching.real:
        launcher = ["deepspeed", "--no_local_rank", "--num_gpus", "2", "--master_port", str(free_port())]
        launcher = ["accelerate", "launch", "--config_file", config] if config else launcher
        return run(place, *launcher, *command, sharded=sharded)
    environment = launching.accelerate_environment(["--config_file", str(place / config)]) if config else {}
    log = launching.forked(2, list(command), environment, place)
    assert not sharded or SHARDED in log
    return log


def loads_plainly(directory: Path) -> None:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    start = transformers.AutoModelForCausalLM.from_pretrained(directory.parents[1] / "tiny")
    pairs = zip(model.parameters(), start.parameters(), strict=True)
    assert all((trained.float() != first.float()).any() for trained, first in pairs), "every parameter was trained"


def test_every_example_is_run_and_short():
    assert set(BLOCKS) == {"recipe", "deepspeed", "script", "trl", "weights", "loss"}
    assert len(re.findall(r"```(?:python|yaml)", DOCS)) == len(BLOCKS)
    for example in BLOCKS.values():
        assert example.count("\n") <= 30


def test_recipe_example(place):
    (place / "qwen3.yaml").write_text(BLOCKS["recipe"])
    small = ["model.path=tiny", "data.sequence_length=32", "training.max_steps=2", "training.learning_rate=1e-2"]
    small += ["model.dtype=float32", "training.bf16=false"]
    log = run(
        place, "accelerate", "launch", "--config_file", "cpu.yaml", "-m", "tp_plugin.finetune", "qwen3.yaml", *small
    )
    assert "a sample from it:\nThe capital of France" in log
    loads_plainly(place / "outputs/qwen3")


def test_deepspeed_example(place):
    (place / "job.py").write_text(BLOCKS["deepspeed"].replace("lr=1e-5", "lr=1e-2"))
    run(place, "deepspeed", "--no_local_rank", "--num_gpus", "2", "--master_port", str(free_port()), "job.py", "tiny")
    loads_plainly(place / "outputs/job")


def test_script_example(place):
    script = BLOCKS["script"].replace("bf16=True", "learning_rate=1e-2").replace('"bfloat16"', '"float32"')
    (place / "train.py").write_text(script)
    run_forked(place, "-m", "tp_plugin.run", "train.py", "tiny", config="cpu.yaml")
    loads_plainly(place / "outputs/script")


def test_trl_example(place):
    (place / "sft.py").write_text(trl_script())
    run_forked(place, "-m", "tp_plugin.run", "sft.py", config="cpu.yaml")
    start = transformers.AutoModelForCausalLM.from_pretrained(place / "tiny")
    adapted = peft.PeftModel.from_pretrained(start, place / "outputs/sft")
    trained = [param for name, param in adapted.named_parameters() if "lora_B" in name]
    assert len(trained) == 7
    assert all(param.any() for param in trained), "every adapter was trained"


def test_weights_example(place):
    (place / "resume.py").write_text(BLOCKS["weights"].replace("lr=1e-5", "lr=1e-2"))
    run_forked(place, "resume.py", "tiny", "2")
    loads_plainly(place / "outputs/model")
    log = run_forked(place, "resume.py", "tiny", "1", sharded=False)
    assert "resumed a checkpoint of tp=2 dp=1 ZeRO-1 at tp=1 dp=2 ZeRO-1" in log
    told = run(place, "tp-plugin", "inspect", "outputs/run", sharded=False)
    assert "global_step2" in told
    run(place, "tp-plugin", "export", "outputs/run", "outputs/exported", sharded=False)
    one, other = (
        transformers.AutoModelForCausalLM.from_pretrained(place / f"outputs/{name}") for name in ("model", "exported")
    )
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_loss_example(tmp_path):
    from tp_plugin.loss import reference_cross_entropy

    (tmp_path / "loss.py").write_text(BLOCKS["loss"].replace("init_process_group()", 'init_process_group("gloo")'))
    # a file for each rank's output: on one pipe two ranks' numbers can stand in each other
    launcher = ["-m", "torch.distributed.run", "--standalone", "--log-dir", "logs", "--redirects", "1"]
    command = [sys.executable, *launcher, "--nproc-per-node", "2", "loss.py"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    torch.manual_seed(0)
    hidden, labels, weight = torch.randn(64, 32), torch.randint(0, 1000, (64,)), torch.randn(1000, 32)
    loss, stats = reference_cross_entropy(hidden, weight, labels, label_smoothing=0.1, z_loss=1e-4)
    printed = [[float(number) for number in file.read_text().split()] for file in tmp_path.glob("logs/**/stdout.log")]
    assert len(printed) == 2
    for numbers in printed:
        assert numbers == pytest.approx([loss.item(), stats.entropy.mean().item()], rel=1e-5)
