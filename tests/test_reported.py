"""What users of DeepSpeed's AutoTP reported of it, and one process's result here.

ms-swift#5217: Qwen2-Audio with LoRA on all linear layers at ZeRO 2 and a degree of 2. axolotl#2491 and #2574: ranks of
a TP group that got different rows, and steps and epochs that were counted once a rank.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tp_plugin
from tests.support import trl_runs
from tests.support.configs import auto_config
from tests.support.errors import relative
from tests.support.models import perturb
from tests.support.ranks import on_ranks

AUDIO = 120  # the token that stands for ten frames of sound
ROWS, SAMPLES = 4, 12


class Sounds(torch.utils.data.Dataset):
    """Sound and a text about it; rows are drawn when they are read, as augmented data is."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        random = torch.Generator().manual_seed(index)
        text = torch.randint(3, 100, (8,), generator=random)
        ids = torch.cat([text[:2], torch.full((10,), AUDIO), text[2:]])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": ids.where(ids != AUDIO, -100),
            "input_features": torch.randn(16, 40, generator=random),
            "feature_attention_mask": torch.ones(40, dtype=torch.long),
        }


def audio_model() -> Any:
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    sound = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
    text = {"hidden_size": 32, "intermediate_size": 53, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2AudioConfig(
        audio_config=sound | {"num_mel_bins": 16, "max_source_positions": 20},
        text_config=text | {"model_type": "qwen2", "num_key_value_heads": 2, "vocab_size": 131, "pad_token_id": 0},
        audio_token_index=AUDIO,
    )
    torch.manual_seed(0)
    return perturb(Qwen2AudioForConditionalGeneration(config))


def train(dp: int, deepspeed: dict[str, Any] | None) -> dict[str, Any]:
    """An epoch of Trainer over LoRA on every linear layer; what it logged, and the adapters."""
    import peft
    from transformers import Trainer, TrainingArguments

    model = peft.get_peft_model(audio_model(), peft.LoraConfig(r=4, target_modules="all-linear"))
    trl_runs.fill(model)
    with trl_runs.common_folder() as folder:
        args = TrainingArguments(
            folder, deepspeed=deepspeed, use_cpu=deepspeed is None, num_train_epochs=2, logging_steps=1,
            per_device_train_batch_size=ROWS // dp, learning_rate=1e-2, adam_epsilon=1e-4, save_strategy="no",
            report_to="none", disable_tqdm=True, bf16=False, gradient_checkpointing=False,
            average_tokens_across_devices=False,  # Trainer doubles this model's loss with two replicas, sharded or not
        )  # fmt: skip
        trainer = Trainer(model=model, args=args, train_dataset=Sounds())
        trainer.train()
        named = dict(trainer.model.named_parameters())
        adapters = {name for name, param in named.items() if param.requires_grad}
        if deepspeed is not None:
            full = tp_plugin.full_state_dict(trainer.model_wrapped)
            named = full if dist.get_rank() == 0 else {}
        log = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        return {
            "log": log,
            "steps": (trainer.state.global_step, trainer.state.max_steps, trainer.state.epoch, len(log)),
            "adapters": {name: param.detach().clone() for name, param in named.items() if name in adapters},
        }


def alone() -> dict[str, Any]:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    return train(1, None)


def sharded(tp: int) -> dict[str, Any]:
    tp_plugin.register()
    config = auto_config(2) | {"tensor_parallel": {"autotp_size": tp}, "tp_plugin": {"quiet": True}}
    return train(dist.get_world_size() // tp, config)


@pytest.fixture(scope="module")
def truth() -> dict[str, Any]:
    return on_ranks(1, alone, group=False)[0]


@pytest.mark.parametrize("world", [2, 4])
def test_qwen2_audio_with_lora_at_zero_2_equals_one_process(truth, world):
    ours = on_ranks(world, sharded, 2)
    for entry, expected in zip(ours[0]["log"], truth["log"], strict=True):
        assert entry["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert entry["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert len(truth["adapters"]) == len(ours[0]["adapters"]) >= 50
    for name, expected in truth["adapters"].items():
        assert relative(ours[0]["adapters"][name], expected) <= 1e-4, name
    for rank in ours:
        assert rank["steps"] == truth["steps"] == (6, 6, 2.0, 6), "steps and epochs of one process"
