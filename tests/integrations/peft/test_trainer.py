"""What HF Trainer leaves of a PEFT model: the files of every adapter, written once."""

from __future__ import annotations

import tempfile

import pytest
import torch
import torch.distributed as dist
import transformers

import tp_plugin
from tests.support import tiny
from tests.support.adapters import adapt, shared_folder
from tests.support.models import make
from tests.support.ranks import on_ranks
from tests.support.trainer_cases import config_of


def saved(stage: int) -> dict[str, dict[str, torch.Tensor]]:
    """By file what Trainer has saved; rank 0 compares it with what we save, and with both adapters read again."""
    from peft import PeftModel
    from safetensors.torch import load_file

    tp_plugin.register()
    model = adapt(make("Llama"), "several")
    arguments = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(), deepspeed=config_of(stage), per_device_train_batch_size=4, max_steps=1,
        learning_rate=0.1, report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=tiny.Samples(8))
    trainer.train()
    with shared_folder() as folder:
        trainer.save_model(str(folder / "trainer"))
        tp_plugin.save_pretrained(trainer.model_wrapped, folder / "direct")
        full = tp_plugin.full_state_dict(trainer.model_wrapped)
        if dist.get_rank() != 0:
            return {}
        files = [path.relative_to(folder / "direct") for path in (folder / "direct").rglob("*.safetensors")]
        assert len(files) == 2
        for file in files:
            found, wanted = load_file(folder / "trainer" / file), load_file(folder / "direct" / file)
            assert found.keys() == wanted.keys(), file
            assert all(torch.equal(found[name], wanted[name]) for name in wanted), file
        again = PeftModel.from_pretrained(make("Llama"), folder / "trainer")
        again.load_adapter(folder / "trainer/second", "second")
        tensors = {name: tensor for name, tensor in again.state_dict().items() if "lora_" in name}
        assert all(torch.equal(tensor, full[name]) for name, tensor in tensors.items())
        return tensors


@pytest.mark.parametrize("stage", [1, 3])
def test_every_adapter_is_saved_as_it_is(stage):
    tensors, _ = on_ranks(2, saved, stage, env={"ACCELERATE_USE_DEEPSPEED": "true"})
    assert {name.split(".")[-2] for name in tensors} == {"default", "second"}
