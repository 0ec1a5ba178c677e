"""Pushing to the hub, whose API is played by a directory: one upload, of a model that plain transformers loads."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import peft
import pytest
import torch
import torch.distributed as dist
from huggingface_hub import HfApi
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import tp_plugin
from tests.support.adapters import adapt
from tests.support.batched_cases import launched, values
from tests.support.hub import Hub
from tests.support.models import batch, make
from tests.support.trainer_cases import config_of, model_of
from tests.support.trainer_data import DATA, padded
from tp_plugin.config import TensorParallelConfig

CASES = ("of_a_model", "of_adapters", "of_peft", "of_a_trainer", "fails_on_rank_0")


def of_a_model() -> tuple[int, str]:
    model = make("Llama")
    tp_plugin.shard_model(model, TensorParallelConfig(tp_size=2, quiet=True))
    with Hub() as hub:
        model.push_to_hub("me/model")
    return hub.uploads, str(hub.directory / "me/model")


def of_adapters() -> tuple[int, list[str], list[str]]:
    """Saved into the directory of their base, where a run has left other things: what was uploaded, and the tags."""
    model = make("Llama")
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    model.add_model_tags(["sharded"])
    tp_plugin.shard_model(model, TensorParallelConfig(tp_size=2, quiet=True))
    shared = [tempfile.mkdtemp()]
    dist.broadcast_object_list(shared)
    folder = Path(shared[0])
    if dist.get_rank() == 0:
        make("Llama").save_pretrained(folder)
        (folder / "checkpoint-1").mkdir()
        shutil.copy(folder / "config.json", folder / "checkpoint-1")
    dist.barrier()
    with Hub() as hub:
        tp_plugin.save_pretrained(model, folder, push_to_hub=True, repo_id="me/model", tags=["mine", "sharded"])
    there = hub.directory / "me/model"
    return hub.uploads, sorted(path.relative_to(there).as_posix() for path in there.rglob("*")), hub.tags


def test_adapters_are_pushed_with_their_config_and_nothing_else():
    (uploads, files, tags), (others, *_) = values(launched(2, __name__, CASES), "of_adapters")
    assert (uploads, others) == (1, 0)
    assert files == ["README.md", "adapter_config.json", "adapter_model.safetensors", "generation_config.json"]
    assert tags == ["sharded", "mine"]


def of_peft() -> tuple[int, list[str]]:
    """A ``PeftModel``'s own push: what was uploaded, and which of its tensors are not those of one process."""
    plain = adapt(make("Llama"), "every linear")
    wanted = peft.get_peft_model_state_dict(plain)
    model = adapt(make("Llama"), "every linear")
    tp_plugin.shard_model(model, TensorParallelConfig(tp_size=2, quiet=True))
    uploads: list[dict] = []

    def upload(_model, working_dir: str, repo_id: str, **_options: object) -> None:
        uploads.append(load_file(Path(working_dir, "adapter_model.safetensors")))

    with Hub(), mock.patch.object(peft.PeftModel, "_upload_modified_files", upload):
        model.push_to_hub("me/adapter")
    if dist.get_rank():
        return len(uploads), []
    (found,) = uploads
    same = {name for name in found.keys() & wanted.keys() if torch.equal(found[name], wanted[name])}
    return len(uploads), sorted((found.keys() | wanted.keys()) - same)


def test_a_peft_model_is_pushed_whole_and_once():
    assert values(launched(2, __name__, CASES), "of_peft") == [(1, []), (0, [])]


def trainer_of() -> Trainer:
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    tp_plugin.register()
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    arguments = TrainingArguments(
        folder[0], deepspeed=config_of(1), max_steps=1, per_device_train_batch_size=2, report_to="none",
        learning_rate=0.0, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model=model_of("causal"), args=arguments, train_dataset=DATA["plain"](4), data_collator=padded)
    trainer.train()
    return trainer


def of_a_trainer() -> tuple[int, str]:
    trainer = trainer_of()
    with Hub() as hub:
        trainer.push_to_hub()
    return hub.uploads, str(hub.directory / "me/model")


class Unsent(Exception):
    """Has an argument that its message does not hold, so a copy of it cannot be made."""

    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")


def fails_on_rank_0() -> list[tuple[str, str]]:
    """What a script that catches every failure meets on this rank, where something fails on rank 0 alone."""
    trainer, met = trainer_of(), []

    def tried(action, place: object, name: str, failure: Exception) -> None:
        def fail(*_args, **_options):
            raise failure

        with contextlib.ExitStack() as stack:
            if dist.get_rank() == 0:
                stack.enter_context(mock.patch.object(place, name, fail))
            try:
                action()
                met.append(("nothing", ""))
            except Exception as caught:
                met.append((type(caught).__name__, str(caught)))
        dist.barrier()  # the ranks are in step

    def save_checkpoint() -> None:
        trainer._save_checkpoint(trainer.model, None)

    away = ConnectionError("the hub is away")
    tried(trainer.push_to_hub, HfApi, "create_repo", away)
    with Hub():
        tried(trainer.push_to_hub, HfApi, "upload_folder", away)
        tried(trainer.push_to_hub, Trainer, "create_model_card", Unsent(7))
    tried(trainer.save_model, torch, "save", OSError(28, "No space left on device"))  # the arguments beside the model
    tried(save_checkpoint, trainer.state, "save_to_json", OSError(28, "No space left on device"))
    model, where = trainer.model_wrapped, trainer.args.output_dir
    tried(lambda: trainer.accelerator.save_model(model, where), type(trainer.accelerator), "save", OSError(5, "broken"))
    trainer.save_model()
    return met


def test_what_fails_on_rank_0_fails_on_every_rank():
    first, second = values(launched(2, __name__, CASES), "fails_on_rank_0")
    assert first == second
    assert first == [
        ("ConnectionError", "the hub is away"),
        ("ConnectionError", "the hub is away"),
        ("TensorParallelError", "Unsent: code 7 [on rank 0]"),
        ("OSError", "[Errno 28] No space left on device"),
        ("OSError", "[Errno 28] No space left on device"),
        ("OSError", "[Errno 5] broken"),
    ]


@pytest.mark.parametrize("case", ["of_a_model", "of_a_trainer"])
def test_a_push_uploads_the_whole_model_once(case):
    (uploads, folder), (others, _) = values(launched(2, __name__, CASES), case)
    assert (uploads, others) == (1, 0)
    plain = make("Llama") if case == "of_a_model" else model_of("causal")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch(0, 2)).logits, plain.eval()(**batch(0, 2)).logits)
