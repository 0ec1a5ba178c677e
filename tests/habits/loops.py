"""Loops written as accelerate's examples and transformers' ``*_no_trainer.py`` write them, sharded or not.

Each takes an ``Accelerator`` and the rows of one reader, and returns what it logs: metrics, rates, weights.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import DummyOptim, DummyScheduler, find_executable_batch_size
from deepspeed.runtime.lr_schedules import WarmupDecayLR
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, get_scheduler

from tests.support import tiny

NO_DECAY = ("bias", "norm.weight")


class Texts(tiny.Samples):
    """Samples with a label for every token, so that a mean of readers' means is the mean over all tokens."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = super().__getitem__(index)
        return row | {"labels": row["input_ids"].clone()}


def grouped(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW in two groups, chosen by names of parameters."""
    named = list(model.named_parameters())
    kept = [parameter for name, parameter in named if any(part in name for part in NO_DECAY)]
    decayed = [parameter for name, parameter in named if not any(part in name for part in NO_DECAY)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, eps=1e-4)


def shared_folder() -> Path:
    folder = [tempfile.mkdtemp()]
    if dist.is_initialized():
        dist.broadcast_object_list(folder)
    return Path(folder[0])


class Notes(GeneralTracker):
    """A tracker of one's own, which writes down what it is told, on the rank that accelerate lets log."""

    name, requires_logging_directory = "notes", False

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Any] = []

    @property
    def tracker(self) -> list[Any]:
        return self.told

    def store_init_configuration(self, values: dict) -> None:
        self.told.append(values)

    def log(self, values: dict, step: int | None = None, **_kwargs: Any) -> None:
        self.told.append((step, values))


class Counter:
    """State of a script's own, kept by ``register_for_checkpointing``."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def perplexity(accelerator: Accelerator, model: Any, loader: Any, rows: int) -> float:
    model.eval()
    losses = []
    for batch in loader:
        with torch.no_grad():
            loss = model(**batch).loss
        losses.append(accelerator.gather_for_metrics(loss.repeat(rows)))
    return math.exp(torch.cat(losses).mean())


def language_modeling(accelerator: Accelerator, rows: int) -> dict:
    """``run_clm_no_trainer``: groups by name, a stretched schedule, a short last step, perplexity, saving."""
    epochs, counter, notes = 2, Counter(), Notes()
    accelerator.trackers = [notes] if accelerator.is_main_process else []
    model = tiny.model()
    optimizer = grouped(model)
    train = DataLoader(Texts(20), batch_size=rows)
    held_out = DataLoader(Texts(8, offset=40), batch_size=rows)
    steps = 6 * accelerator.num_processes  # max_train_steps, stretched, since a schedule steps once a process
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=accelerator.num_processes, num_training_steps=steps)
    model, optimizer, train, held_out, schedule = accelerator.prepare(model, optimizer, train, held_out, schedule)
    accelerator.register_for_checkpointing(counter)
    folder, found = (
        shared_folder(),
        {"losses": [], "rates": [], "perplexity": [], "batch": rows * accelerator.num_processes},
    )
    for _ in range(epochs):
        model.train()
        total = 0.0
        for batch in train:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                total += loss.detach().float()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                counter.count += 1
                found["rates"].append(schedule.get_last_lr()[0])
        found["losses"].append(float(accelerator.reduce(total, "mean")) / len(train))
        found["perplexity"].append(perplexity(accelerator, model, held_out, rows))
        accelerator.log({"perplexity": found["perplexity"][-1]}, step=counter.count)
        accelerator.save_state()
    found |= {"count": counter.count, "told": notes.told, "length": len(train)}
    return found | saved(accelerator, model, folder) | resumed(accelerator, model, counter)


def saved(accelerator: Accelerator, model: Any, folder: Path) -> dict:
    """The last lines of every such script; which files there are, and the logits of the model they hold."""
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(
        folder,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    accelerator.wait_for_everyone()
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(tiny.batch([3])["input_ids"]).logits
    return {"files": sorted(path.name for path in folder.iterdir()), "logits": logits}


def resumed(accelerator: Accelerator, model: Any, counter: Counter) -> dict:
    """The newest of the checkpoints that accelerate names and limits by itself, loaded over spoilt weights."""
    accelerator.wait_for_everyone()
    kept = sorted(path.name for path in Path(accelerator.project_dir, "checkpoints").iterdir())
    before = counter.count
    counter.count = -1
    accelerator.load_state()
    return {"kept": kept, "restored": counter.count == before}


def set_later(accelerator: Accelerator, rows: int) -> dict:
    """``automatic_gradient_accumulation``: set on the accelerator, inside of a search for a batch size."""

    @find_executable_batch_size(starting_batch_size=rows)
    def train(batch_size: int) -> dict:
        accelerator.gradient_accumulation_steps = 2
        accelerator.free_memory()
        model = tiny.model()
        optimizer = grouped(model)
        loader = DataLoader(Texts(16), batch_size=batch_size)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        losses, steps = [], 0
        with accelerator.join_uneven_inputs([model]):
            for batch in loader:
                with accelerator.accumulate(model):
                    loss = model(**batch).loss
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                    steps += accelerator.sync_gradients
                losses.append(float(accelerator.reduce(loss.detach(), "mean")))
        with accelerator.profile() as profile:
            accelerator.gather(loss.detach())
        return {"losses": losses, "steps": steps, "profiled": bool(profile.key_averages())}

    return train()


PLANNED = {
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.1, "torch_adam": True}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_num_steps": "auto", "total_num_steps": "auto", "warmup_min_lr": 0, "warmup_max_lr": 1e-2},
    },
}
"""Optimizer and schedule of a DeepSpeed config, filled in from a script's DummyOptim and DummyScheduler."""


def planned(accelerator: Accelerator, rows: int) -> dict:
    """``deepspeed_with_config_support``; one process steps DeepSpeed's own schedule beside torch's optimizer."""
    model = tiny.model()
    loader = DataLoader(Texts(20), batch_size=rows)
    steps = 5 * accelerator.num_processes
    if accelerator.deepspeed_plugin is not None:
        optimizer = DummyOptim(model.parameters(), lr=1e-2)
        schedule = DummyScheduler(optimizer, total_num_steps=steps, warmup_num_steps=2)
        model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.1)
        schedule = WarmupDecayLR(optimizer, total_num_steps=5, warmup_num_steps=2, warmup_max_lr=1e-2)
    losses, rates = [], []
    for batch in loader:
        loss = model(**batch).loss
        rates.append(float(optimizer.param_groups[0]["lr"]))
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    return {"losses": losses, "rates": rates}


def goes_on(accelerator: Accelerator, rows: int) -> dict:
    """``use_stateful_dataloader``: after ``load_state`` a loader goes on where it was."""
    model = tiny.model()
    optimizer = grouped(model)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Texts(24), batch_size=rows))

    def step(batch: dict) -> float:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return float(accelerator.reduce(loss.detach(), "mean"))

    for number, batch in enumerate(loader):
        step(batch)
        if number == 1:
            accelerator.save_state()
            break
    accelerator.load_state()
    found = [(accelerator.gather(batch["input_ids"][:, 0]).tolist(), step(batch)) for batch in loader]
    return {"read": [numbers for numbers, _ in found], "losses": [loss for _, loss in found]}
