"""A program that people fine-tune with: what it is made of, and its command for a case."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.support.ranks import ROOT

STEPS, ROWS, RATE = 4, 4, 1e-3
"""Optimizer steps (but of an epoch), rows of a global batch, and the learning rate of every case."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One training of a program.

    Attributes:
        kind: what it trains: a key of :attr:`Program.kinds`.
        world: its processes.
        tp: the degree that its configuration asks for; 1 is one plain process without DeepSpeed.
        ours: whether tp_plugin is asked for; DeepSpeed's AutoTP answers otherwise.
    """

    kind: str
    world: int = 1
    tp: int = 1
    ours: bool = True

    @property
    def name(self) -> str:
        """A word for folders and the table."""
        if self.tp == 1:
            return f"{self.kind}-one"
        return f"{self.kind}-{'ours' if self.ours else 'autotp'}-tp{self.tp}xdp{self.world // self.tp}"

    @property
    def micro_batch(self) -> int:
        """Rows of a batch of one replica, so that replicas share what one process takes."""
        return ROWS * self.tp // self.world


Words = list[str]
Command = Callable[[Path, Case, Path], list[Words]]
"""Writes a program's configuration and returns its commands, of the folder of the inputs, a case and its output. The
first that makes ``LAST`` in its output reports there what counts."""
LAST = "last"
Finish = Callable[[Path, Path], list[tuple[Words, str]]]
"""Of the folder of the inputs and of a trained adapter: commands in one plain process, and what each reads from its
standard input. They leave a model in ``MERGED`` beside the adapter, and answers in ``ANSWERS`` or printed."""
MERGED, ANSWERS = "merged", "answers.jsonl"
QUESTION = "w5 w7 w9"


@dataclasses.dataclass(frozen=True)
class Program:
    """How a program is installed and called.

    Attributes:
        name: as people write it.
        package: its requirement. Its own requirements are not installed; ``needs`` names those that texts need.
        of: the set of tests/versions/sets.toml that has the libraries it pins.
        needs: more requirements; one of a library of the set is taken instead.
        kinds: what is trained, by name.
        finish: the program's own merge and inference of an adapter; after the kind of that name.
        answer: the answers in what its inference printed or left, by a regular expression.
        environment: variables of the command, by case.
        alone: kinds for which one process is no measure of two replicas, and why.
    """

    name: str
    package: str
    of: str
    needs: tuple[str, ...]
    kinds: dict[str, Command]
    finish: dict[str, Finish]
    answer: str
    environment: Callable[[Case], dict[str, str]]
    alone: dict[str, str] = dataclasses.field(default_factory=dict)


def write_inputs(folder: Path) -> None:
    """Write a small Llama with random weights, an adapter, its tokenizer, and chats and preferences as JSON files.

    Answers are equally long: axolotl averages over each replica's tokens by itself, so that a mean of two replicas is
    not that of one process otherwise.
    """
    import peft

    from tests.support import chat, tiny

    model = tiny.model()
    model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id = 2, 3, 0
    model.generation_config.bos_token_id, model.generation_config.eos_token_id = 2, 3
    model.save_pretrained(folder / "model")
    chat.tokenizer().save_pretrained(folder / "model")
    lora = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="gaussian"
    )
    adapted = peft.get_peft_model(model, lora)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "model")
    adapted.save_pretrained(folder / "adapter")
    draw = random.Random(0)
    asked: list[dict] = []
    preferred: list[dict] = []
    messages: list[dict] = []
    chosen: list[dict] = []
    for _ in range(ROWS * STEPS * 2):
        prompt, good, bad = chat.words(draw, 3, 7), chat.words(draw, 5, 5), chat.words(draw, 3, 7)
        asked.append({"instruction": prompt, "input": "", "output": good})
        preferred.append({"instruction": prompt, "input": "", "chosen": good, "rejected": bad})
        said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": good}]
        messages.append({"messages": said, "rejected_response": bad})
        pair = {"chosen": said, "rejected": [said[0], {"role": "assistant", "content": bad}]}
        chosen.append(pair)
    for name, rows in {"asked": asked, "preferred": preferred, "messages": messages, "chosen": chosen}.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))


def recipe(program: str, name: str) -> dict[str, Any]:
    """What ``recipes/PROGRAM/NAME.yaml`` says."""
    return yaml.safe_load((ROOT / "recipes" / program / f"{name}.yaml").read_text())


def written(path: Path, config: dict[str, object]) -> str:
    """Write a program's configuration; its path as a word of a command."""
    path.write_text(yaml.safe_dump(config))
    return str(path)


def files_of(config: dict[str, Any], output: Path, half: Path | None = None) -> list[str]:
    """The file of a training; with ``half``, the checkpoint it makes half way, and that of one that goes on from it."""
    if half is None:
        return [written(output / "train.yaml", config)]
    config = config | {"save_steps": STEPS // 2, "save_only_model": False}
    again = config | {"output_dir": str(output / LAST), "resume_from_checkpoint": str(half)}
    return [written(output / "train.yaml", config), written(output / "again.yaml", again)]


def deepspeed_file(case: Case, output: Path) -> str:
    """The recipes' DeepSpeed config of ZeRO-1; for DeepSpeed's own AutoTP a copy without what only tp_plugin reads."""
    path = ROOT / "recipes" / "deepspeed" / "tp2_zero1.json"
    if case.ours:
        return str(path)
    config = json.loads(path.read_text())
    del config["tp_plugin"], config["tensor_parallel"]["partition_config"]
    copy = output / "deepspeed.json"
    copy.write_text(json.dumps(config))
    return str(copy)
