"""Optimizers that libraries drop or leave behind in silence, with tensor parallelism or without: said in one line."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import tp_plugin
from tests.support.batched_cases import launched, values
from tests.support.configs import ACCUMULATION, config_for
from tests.support.models import make
from tests.support.train import engine_for, loss_of, micro_batches
from tests.support.trainer_cases import config_of, model_of
from tests.support.trainer_data import DATA, padded
from tp_plugin.integrations.accelerate import cpu


class Averaging(torch.optim.Optimizer):
    """SGD whose ``eval()`` moves the weights half-way back to where they began, and ``train()`` forth again."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.start = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}
        self.training = True

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(param.grad, alpha=group["lr"])

    @torch.no_grad()
    def _move(self, training: bool) -> None:
        if training is not self.training:
            self.training = training
            for group in self.param_groups:
                for param in group["params"]:
                    start = self.start.setdefault(param, param.detach().clone())
                    param.copy_(2 * param - start if training else (param + start) / 2)

    def train(self) -> None:
        self._move(True)

    def eval(self) -> None:
        self._move(False)


class Made(Trainer):
    """A trainer with an optimizer of its own."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        return super().create_optimizer(model)


ADAMW = {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}}


def trained(kind: type[Trainer] = Trainer, config: dict | None = None, given: Any = None, **options: Any):
    """What rank 0 is told in a training of one step, and the optimizer that DeepSpeed got."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    tp_plugin.register()
    arguments = TrainingArguments(
        tempfile.mkdtemp(), deepspeed=config_of(1, **config or {}), max_steps=1, report_to="none", disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    model = model_of("causal")
    optimizers = (None, None) if given is None else given(model)
    trainer = kind(
        model=model, args=arguments, train_dataset=DATA["plain"](4), data_collator=padded, optimizers=optimizers,
        **options,
    )  # fmt: skip
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        trainer.train()
    told = [line for line in said.getvalue().splitlines() if "WARNING" in line]
    return told, type(trainer.model_wrapped.basic_optimizer).__name__


def given_to_trainer():
    return trained(given=lambda model: (torch.optim.SGD(model.parameters(), lr=0.1), None))


def a_scheduler_given_to_trainer():
    def given(model: torch.nn.Module) -> tuple:
        return None, torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(model.parameters(), lr=0.1))

    return trained(given=given)


def made_by_the_trainer():
    return trained(Made)


def made_by_the_trainer_beside_the_configs():
    return trained(Made, ADAMW)


def asked_for_beside_the_configs():
    return trained(config=ADAMW, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}))


def nothing_special():
    return trained(config=ADAMW)


def averaged(stage: int) -> tuple[str, float]:
    """What is said when the engine is made, and how far the model is from one process's averages after ``eval()``."""
    plain, model, said = make("Llama"), make("Llama"), io.StringIO()
    truth, ours = Averaging(plain.parameters()), Averaging(model.parameters())
    with contextlib.redirect_stderr(said):
        engine = engine_for(model, ours, config_for(2, stage) | {"gradient_clipping": 0.0})
    if stage == 0:
        ours.start = {p: p.detach().clone() for p in model.parameters()}  # those of shards
    for (piece,) in micro_batches(0, 1):
        (loss_of(plain, piece, 0) / ACCUMULATION).backward()
        engine.backward(loss_of(engine, piece, 0))
        engine.step()
    truth.step()
    for optimizer in (truth, ours):
        optimizer.eval()
    whole = tp_plugin.full_state_dict(engine)
    worst = max((float((whole[n] - p).abs().max()) for n, p in plain.named_parameters() if n in whole), default=0.0)
    return said.getvalue(), worst


def averaged_at_stage_0():
    return averaged(0)


def averaged_at_stage_1():
    return averaged(1)


TOLD = {
    "given_to_trainer": (
        "drops what Trainer(optimizers=...) was given (optimizer SGD) and trains with training.optim's (adamw_torch",
        "AdamW",
    ),
    "a_scheduler_given_to_trainer": ("was given (scheduler ConstantLR) and trains with a schedule of its own", "AdamW"),
    "made_by_the_trainer": (None, "SGD"),
    "made_by_the_trainer_beside_the_configs": (
        "trains with the AdamW of the DeepSpeed config and not with what Made.create_optimizer makes",
        "AdamW",
    ),
    "asked_for_beside_the_configs": ("and not with the SGD of optimizer_cls_and_kwargs", "AdamW"),
    "nothing_special": (None, "AdamW"),
}
NAMES = (*TOLD, "averaged_at_stage_0", "averaged_at_stage_1")


@pytest.mark.parametrize("name", TOLD)
def test_an_optimizer_that_transformers_drops_is_named(name):
    expected, kind = TOLD[name]
    for rank, (told, made) in enumerate(values(launched(2, __name__, NAMES), name)):
        assert made == kind
        if expected is None or rank:
            assert told == []
        else:
            (line,) = told
            assert expected in line


def test_modes_of_a_schedule_free_optimizer_reach_the_model_at_stage_0_only():
    (said, error), *_ = values(launched(2, __name__, NAMES), "averaged_at_stage_0")
    assert "WARNING" not in said
    assert error < 1e-6
    (said, error), (other, _) = values(launched(2, __name__, NAMES), "averaged_at_stage_1")
    assert "train() and eval() of the optimizer Averaging do not reach the model under ZeRO stage 1" in said
    assert error > 1e-4, "it reaches the model now: take the warning back"
    assert "WARNING" not in other


class DeepSpeedCPUAdam:
    def __init__(self, adam_w_mode: bool) -> None:
        self.adam_w_mode = adam_w_mode


class Lion(torch.optim.SGD):
    """As somebody names an optimizer of theirs."""


@pytest.mark.parametrize(
    ("kind", "decoupled", "like"),
    [
        *((torch.optim.AdamW, True, True), (torch.optim.AdamW, False, False), (torch.optim.Adam, False, True)),
        *((torch.optim.SGD, False, False), (Lion, False, False), (torch.optim.RAdam, False, False)),
    ],
)
def test_an_optimizer_that_accelerate_replaces_is_named(monkeypatch, caplog, kind, decoupled, like):
    made, optimizer = DeepSpeedCPUAdam(decoupled), kind(torch.nn.Linear(2, 2).parameters(), lr=0.1)
    monkeypatch.setattr(cpu, "tp_size", lambda: 2)
    assert cpu._map_pytorch_optim_to_deepspeed(lambda _optimizer: made, optimizer) is made
    assert cpu.is_like(optimizer, made) is like
    said = caplog.text
    assert (said == "") is like
    assert like or f"and not with the optimizer {kind.__name__}, since its state is offloaded" in said
