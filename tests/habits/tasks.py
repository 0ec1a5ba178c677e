"""Loops of tasks, as accelerate's, transformers' and PEFT's scripts have them: folds, translation, search.

See :mod:`tests.habits.loops`.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaForSequenceClassification, get_scheduler

from tests.habits.loops import Texts, grouped
from tests.support import tiny, zoo
from tests.support.models import perturb

PAD = 0


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
    """Cut rows that were repeated to fill the last batch, as ``multi_process_metrics`` does by hand."""
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
            made = accelerator.unwrap_model(model).generate(batch["input_ids"], max_new_tokens=4, num_beams=2)
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
    """PEFT's semantic search: LoRA in a wrapper, two forwards a step, a loss outside, model.zero_grad()."""
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
