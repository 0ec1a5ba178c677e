"""A Trainer whose first step is guarded, and a look at what the guard compares."""

from __future__ import annotations

import contextlib
import io
import tempfile

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainingArguments, training_args

import tp_plugin
from tests.support import tiny
from tests.support.guarded import compared
from tests.support.trainer_cases import config_of
from tp_plugin.step_guard.guard import guard_of

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}


UNCHECKED = "could not be computed again without tensor parallelism"


class SeedsOfTheirOwn(TrainerCallback):
    """As a script has it that seeds each process by its rank."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 0:
            torch.manual_seed(dist.get_rank())


def trainer_of(samples, kind=Trainer, stage=1, attention=None, **options):
    """A trainer of a model with dropout, whose ranks have random generators of their own."""
    tp_plugin.register()
    model = tiny.model()
    model.config.attention_dropout = 0.2
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    if attention is not None:
        model.set_attn_implementation(attention)
    # transformers has it on GPUs only, unless asked for plain CPU training without DeepSpeed
    training_args.is_torch_bf16_gpu_available = lambda: True
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), deepspeed=config_of(stage), bf16=attention is not None,
        per_device_train_batch_size=4, max_steps=2, report_to="none", disable_tqdm=True, save_strategy="no",
        logging_steps=1, **options.pop("arguments", {}),
    )  # fmt: skip
    trainer = kind(model=model, args=arguments, train_dataset=samples, **options)
    trainer.add_callback(SeedsOfTheirOwn())
    return trainer


def trained(*args, **options):
    """(what the guard compared, what was said on stderr, the trainer) of two steps."""
    seen = {}
    with contextlib.redirect_stderr(io.StringIO()) as said, compared(seen):
        trainer = trainer_of(tiny.Samples(16), *args, **options)
        trainer.train()
    assert not guard_of(trainer.model).due[True]
    return seen, said.getvalue(), trainer
