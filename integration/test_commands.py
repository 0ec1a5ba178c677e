"""TRL's commands with YAML files as its documentation writes them: ``tp-plugin exec trl sft`` against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl.scripts
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from tests.support import tiny
from tests.support.configs import auto_config
from tests.support.launching import ENVIRONMENT, alone, deepspeed_config, executed, free_port

STEPS, TP = 3, 2
OPTIONS = {
    "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "adam_epsilon": 1e-4,
    "logging_steps": 1, "save_steps": STEPS, "report_to": "none", "bf16": False, "max_length": 24, "dtype": "float32",
    "gradient_checkpointing": False, "lr_scheduler_type": "constant",
}  # fmt: skip
WORDS = [*"abcdefghijklmnopqrstuvwxyz", " "]


def rows(kind: str) -> list[dict]:
    texts = ["abc def ", "xyz ", "the lazy dog "]
    if kind == "sft":
        return [{"text": (texts[i % 3] * 3)[: 20 + i % 5]} for i in range(32)]
    return [{"prompt": texts[i % 3], "chosen": "ab" * (1 + i % 4), "rejected": "zy" * (2 + i % 3)} for i in range(32)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a tokenizer of letters, data sets, and the files of a launch on two CPU ranks."""
    folder = tmp_path_factory.mktemp("trl")
    tiny.model().save_pretrained(folder / "model")
    vocab = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    letters = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder / "model")
    for kind in ("sft", "dpo", "reward"):
        (folder / kind).mkdir()
        (folder / kind / "train.jsonl").write_text("\n".join(map(json.dumps, rows(kind))))
    (folder / "ds.json").write_text(json.dumps(auto_config(1)))
    (folder / "accelerate.yaml").write_text(
        f"compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nuse_cpu: true\nnum_machines: 1\n"
        f"machine_rank: 0\nnum_processes: {TP}\nmain_process_port: {free_port()}\n"
        f"deepspeed_config:\n  deepspeed_config_file: {folder}/ds.json\n  zero3_init_flag: false\n"
    )
    return folder


def written(folder: Path, kind: str, name: str, **more: object) -> str:
    """The YAML file of one run, whose results go into the folder ``name``."""
    own = {
        "model_name_or_path": f"{folder}/model",
        "dataset_name": f"{folder}/{kind}",
        "output_dir": f"{folder}/{name}",
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(own | OPTIONS | more))
    return f"{folder}/{name}.yaml"


def results(folder: Path, name: str, kind: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """What a run has logged, and the weights it has saved."""
    log = json.loads((folder / name / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    auto = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    return log, auto.from_pretrained(folder / name).state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo", "reward"])
def test_a_command_equals_one_process(folder, kind):
    script = str(Path(trl.scripts.__file__).parent / f"{kind}.py")
    alone([script, "--config", written(folder, kind, f"{kind}-alone", use_cpu=True)])
    config = written(folder, kind, f"{kind}-sharded", accelerate_config=f"{folder}/accelerate.yaml")
    output = executed(TP, ["trl", kind, "--config", config])
    assert output.count("tp_plugin: the first step agrees with the same step without tensor parallelism") == 1
    (expected, truth), (found, ours) = (results(folder, f"{kind}-{how}", kind) for how in ("alone", "sharded"))
    assert len(expected) == STEPS
    for key in ("loss", "grad_norm"):
        logged = [[entry[key] for entry in log] for log in (found, expected)]
        assert logged[0] == pytest.approx(logged[1], rel=1e-5 if key == "loss" else 1e-4)
    assert ours.keys() == truth.keys()
    start = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    for name, weight in truth.items():
        update = weight - start.get(name, torch.zeros_like(weight))
        assert (ours[name] - weight).norm() <= 1e-4 * update.norm(), f"the update of {name}"


def agents(folder: Path, config: str, plugin_on: tuple[bool, bool] = (True, True)) -> list[tuple[int, str]]:
    """``tp-plugin exec torchrun`` twice, a rank each, as on two hosts; exit code and output of each."""
    (folder / "tripwire.json").write_text(json.dumps(deepspeed_config(1)))
    bin_folder, port = Path(sys.executable).parent, str(free_port())
    started = []
    for host, on in enumerate(plugin_on):
        way_in = [str(bin_folder / "tp-plugin"), "exec"] if on else []
        command = [*way_in, str(bin_folder / "torchrun"), "--nnodes", "2", "--node-rank", str(host)]
        command += ["--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port]
        command.append(str(Path(trl.scripts.__file__).parent / "sft.py"))
        env = ENVIRONMENT | {"PATH": f"{bin_folder}:{os.environ['PATH']}"}
        words = [*command, "--config", config, "--deepspeed", str(folder / "tripwire.json"), "--use_cpu", "true"]
        out = (folder / f"agent-{host}.log").open("w")
        started.append((subprocess.Popen(words, env=env, stdout=out, stderr=subprocess.STDOUT, cwd=folder), out))
    codes = [one.wait(300) for one, _ in started]
    return [(code, Path(out.name).read_text()) for code, (_, out) in zip(codes, started, strict=True)]


@pytest.mark.slow
def test_two_agents_train_as_one_process(folder):
    script = str(Path(trl.scripts.__file__).parent / "sft.py")
    alone([script, "--config", written(folder, "sft", "agents-alone", use_cpu=True)])
    for code, output in agents(folder, written(folder, "sft", "agents-sharded")):
        assert code == 0, output[-4000:]
    (expected, truth), (found, ours) = (results(folder, f"agents-{how}", "sft") for how in ("alone", "sharded"))
    assert [entry["loss"] for entry in found[:STEPS]] == pytest.approx(
        [entry["loss"] for entry in expected[:STEPS]], rel=1e-5
    )
    for name, weight in truth.items():
        assert (ours[name] - weight).norm() <= 1e-4 * weight.norm(), name


@pytest.mark.slow
def test_a_host_without_the_plugin_is_named_and_both_end(folder):
    (with_it, said), (without, _) = agents(folder, written(folder, "sft", "agents-mixed"), (True, False))
    assert "rank 1 of this job run without tp_plugin; start it alike on every host" in said, said[-4000:]
    assert with_it != 0
    assert without != 0
