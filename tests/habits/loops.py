"""Loops written as accelerate's examples and transformers' ``*_no_trainer.py`` write them, sharded or in one process.

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
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, get_scheduler

from tests.support import tiny, zoo
from tests.support.models import perturb

PAD = 0
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
    folder, found = shared_folder(), {"losses": [], "rates": [], "perplexity": [], "batch": rows * accelerator.num_processes}
    for epoch in range(epochs):
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


def classifier() -> torch.nn.Module:
    config = tiny.model().config
    config.num_labels, config.pad_token_id = 3, PAD
    torch.manual_seed(1)
    return perturb(LlamaForSequenceClassification(config))


class Classes(tiny.Samples):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = super().__getitem__(index)
        return {"input_ids": row["input_ids"].clamp(min=1), "labels": torch.tensor(index % 3)}


def cut(accelerator: Accelerator, loader: Any, step: int, seen: int, rows: torch.Tensor) -> torch.Tensor:
    """Cut the rows that were repeated to fill the last batch, as accelerate's ``multi_process_metrics`` does by hand."""
    if accelerator.use_distributed and step == len(loader) - 1:
        return rows[: len(loader.dataset) - seen]
    return rows


def folds(accelerator: Accelerator, rows: int) -> dict:
    """``cross_validation``: a model, an optimizer and loaders a fold, and ``free_memory`` between them."""
    found: dict = {"logits": [], "seen": [], "rates": [], "losses": []}
    for fold in range(2):
        model = classifier()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
        train = DataLoader(Classes(12, offset=20 * fold), batch_size=rows)
        held_out = DataLoader(Classes(7, offset=60), batch_size=rows)
        schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=len(train))
        prepared = accelerator.prepare(model, optimizer, train, held_out, schedule)
        model, optimizer, train, held_out, schedule = prepared
        model.train()
        for batch in train:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            found["losses"].append(float(accelerator.reduce(loss.detach(), "mean")))
        found["rates"].append(schedule.get_last_lr()[0])
        model.eval()
        logits, seen = [], 0
        for step, batch in enumerate(held_out):
            with torch.no_grad():
                made = model(**batch).logits
            made, numbers = accelerator.gather((made, batch["input_ids"][:, 0]))
            logits.append(cut(accelerator, held_out, step, seen, made))
            found["seen"] += cut(accelerator, held_out, step, seen, numbers).tolist()
            seen += len(numbers)
        found["logits"].append(torch.cat(logits))
        model, optimizer = accelerator.free_memory(model, optimizer)
    return found


def translated(accelerator: Accelerator, rows: int) -> dict:
    """``run_summarization_no_trainer``: generation, padded over processes, gathered with padded labels."""
    model = zoo.build("t5")
    model.generation_config.eos_token_id = None
    optimizer = grouped(model)
    loader = DataLoader(Pairs(8), batch_size=rows, collate_fn=collate)
    held_out = DataLoader(Pairs(7, offset=20), batch_size=rows, collate_fn=collate)
    model, optimizer, loader, held_out = accelerator.prepare(model, optimizer, loader, held_out)
    # made after prepare(), of the wrapped optimizer: it steps once a call
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=len(loader))
    for batch in loader:
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            schedule.step()
        optimizer.zero_grad()
    model.eval()
    found: dict = {"rates": schedule.get_last_lr(), "texts": [], "labels": [], "shapes": []}
    for batch in held_out:
        with torch.no_grad():
            made = accelerator.unwrap_model(model).generate(batch["input_ids"], max_new_tokens=4 + len(found["texts"]) % 2,
                                                            num_beams=2)  # fmt: skip
        made = accelerator.pad_across_processes(made, dim=1, pad_index=PAD)
        labels = accelerator.pad_across_processes(batch["labels"], dim=1, pad_index=-100)
        made, labels = accelerator.gather_for_metrics((made, labels))
        found["texts"] += made.tolist()
        found["labels"] += [[word for word in row if word != -100] for row in labels.tolist()]
    return found


class Pairs(tiny.Samples):
    """Inputs of one length, labels of many."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = super().__getitem__(index)["input_ids"] % 60 + 1
        return {"input_ids": ids, "labels": ids[: 3 + (index + self.offset) % 5]}


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    labels = torch.nn.utils.rnn.pad_sequence([one["labels"] for one in samples], batch_first=True, padding_value=-100)
    return {"input_ids": torch.stack([one["input_ids"] for one in samples]), "labels": labels}


class Embedder(torch.nn.Module):
    """A model of one's own around a trunk, as PEFT's semantic search has one: means of hidden states, normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny.model().model

    def forward(self, **inputs: Any) -> torch.Tensor:
        hidden = self.model(**inputs)[0]
        return torch.nn.functional.normalize(hidden.mean(1), dim=1)


def embedder() -> torch.nn.Module:
    import peft

    model = peft.get_peft_model(Embedder(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def searched(accelerator: Accelerator, rows: int) -> dict:
    """PEFT's semantic search: LoRA in a wrapper, two forwards a step, a loss outside the model, model.zero_grad()."""
    model = embedder()
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2, eps=1e-4)
    loader = DataLoader(Texts(12), batch_size=rows)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    total = torch.zeros(())
    for batch in loader:
        with accelerator.accumulate(model):
            queries, products = model(input_ids=batch["input_ids"]), model(input_ids=batch["labels"].flip(1))
            loss = (1 - (queries * products).sum(1)).square().mean()
            total = total + accelerator.reduce(loss.detach().float(), reduction="sum")
            accelerator.backward(loss)
            optimizer.step()
            model.zero_grad()
    weights = accelerator.get_state_dict(model)
    return {
        "losses": [float(total) / accelerator.num_processes],
        "weights": {name: weight.clone() for name, weight in weights.items() if "lora_" in name},
    }


def set_later(accelerator: Accelerator, rows: int) -> dict:
    """``automatic_gradient_accumulation``: accumulation is set on the accelerator, inside of a search for a batch size."""

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
