"""What Trainer's training goes through before the guard of the first step compares anything."""

from __future__ import annotations

import tempfile

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainingArguments

import tp_plugin
from integration.scripts import tiny
from tests.support.ranks import errors_on_ranks, on_ranks
from tests.support.trainings import config_of
from tp_plugin.verify.first_step import guard_of


class SeedsOfTheirOwn(TrainerCallback):
    """As a script has it that seeds each process by its rank."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 0:
            torch.manual_seed(dist.get_rank())


class OtherRows(tiny.Samples):
    def __getitem__(self, index):
        return super().__getitem__((index + dist.get_rank()) % self.count)


def trainer_of(samples) -> Trainer:
    """A trainer of a model with dropout, whose ranks have random generators of their own."""
    tp_plugin.register()
    model = tiny.model()
    model.config.attention_dropout = 0.2
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), deepspeed=config_of(1), per_device_train_batch_size=4, max_steps=2,
        report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=samples)
    trainer.add_callback(SeedsOfTheirOwn())
    return trainer


def compared():
    """Losses of two steps, and whether the guard ran."""
    trainer = trainer_of(tiny.Samples(8))
    trainer.train()
    guard = guard_of(trainer.model)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], guard.due[True]


def test_generators_are_brought_in_step_first():
    (losses, due), other = on_ranks(2, compared, env={"ACCELERATE_USE_DEEPSPEED": "true"})
    assert other == (losses, due)
    assert len(losses) == 2
    assert not due


def other_batches():
    trainer_of(OtherRows(8)).train()


def test_other_rows_on_one_rank_are_named_before_anything_is_computed():
    errors = errors_on_ranks(2, other_batches, env={"ACCELERATE_USE_DEEPSPEED": "true"})
    assert all("got different batches" in error for error in errors)
