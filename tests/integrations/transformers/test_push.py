"""Pushing to the hub, whose API is played by a directory: one upload, of a model that plain transformers loads."""

import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import peft
import pytest
import torch
import torch.distributed as dist
import transformers.utils.hub
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import tp_plugin
from tests.support.cases import launched, values
from tests.support.models import batch, make
from tests.support.trainings import DATA, config_of, model_of, padded
from tp_plugin.config import TensorParallelConfig

CASES = ("of_a_model", "of_adapters", "of_a_trainer")


class Hub:
    """What was uploaded, in a directory."""

    def __init__(self) -> None:
        self.uploads, self.directory, self.tags = 0, Path(tempfile.mkdtemp()), list[str]()

    def __enter__(self) -> "Hub":
        def upload(_api, *, repo_id, folder_path, allow_patterns=None, ignore_patterns=None, **_options):
            self.uploads += 1
            here = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
            for name in filter_repo_objects(here, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
                target = self.directory / repo_id / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(Path(folder_path, name), target)

        def tagged(_repo_id, tags=None, **_options):
            self.tags += tags or []
            return card

        created = SimpleNamespace(repo_id="me/model")
        card = SimpleNamespace(save=lambda path: Path(path).write_text("card"), data=SimpleNamespace(tags=[]))
        self.patches = [
            mock.patch.object(HfApi, "create_repo", return_value=created),
            mock.patch.object(HfApi, "upload_folder", upload),
            mock.patch.object(transformers.utils.hub, "create_and_tag_model_card", tagged),
            mock.patch.object(Trainer, "create_model_card", return_value=None),
        ]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self.patches:
            patch.stop()


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


def of_a_trainer() -> tuple[int, str]:
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
    with Hub() as hub:
        trainer.push_to_hub()
    return hub.uploads, str(hub.directory / "me/model")


@pytest.mark.parametrize("case", ["of_a_model", "of_a_trainer"])
def test_a_push_uploads_the_whole_model_once(case):
    (uploads, folder), (others, _) = values(launched(2, __name__, CASES), case)
    assert (uploads, others) == (1, 0)
    plain = make("Llama") if case == "of_a_model" else model_of("causal")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch(0, 2)).logits, plain.eval()(**batch(0, 2)).logits)
