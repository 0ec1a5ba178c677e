"""A case through HF Trainer."""

from __future__ import annotations

import math
import tempfile
from typing import Any

import torch

from tests.fuzz.batches import batches
from tests.fuzz.build import TRAINER_EPS, TRAINER_LR, Run, built, ds_config, later
from tests.fuzz.case import Case
from tests.fuzz.losses import own
from tests.support.configs import CLIP


def by_trainer(case: Case, run: Run) -> Any:
    """The same batches through HF Trainer; gradients are not asked for."""
    import transformers

    import tp_plugin

    tp_plugin.register()
    rows = Rows([m for step in range(len(case.batches)) for part in batches(case, step) for m in part])
    config = ds_config(case) | {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model = built(case)
        more = {} if case.checkpointing is None else {
            "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": case.checkpointing},
        }  # fmt: skip
        args = transformers.TrainingArguments(
            output_dir=folder, deepspeed=config, per_device_train_batch_size=1, learning_rate=TRAINER_LR,
            gradient_accumulation_steps=case.accumulation, adam_epsilon=TRAINER_EPS, lr_scheduler_type="constant",
            max_grad_norm=CLIP, weight_decay=0.0, max_steps=len(case.batches), logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True, logging_nan_inf_filter=False, remove_unused_columns=False,
            train_sampling_strategy="sequential", **more,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=model, args=args, train_dataset=rows, data_collator=lambda found: dict(found[0]),
            compute_loss_func=trainer_own if case.loss == "own" else None,
        )  # fmt: skip
        with later(lambda: trainer.state.global_step):
            trainer.train()
        for entry in trainer.state.log_history:
            if "loss" in entry:
                # transformers goes on from a sum that it empties by subtracting it from itself, which a NaN survives
                run.losses.append(None if run.losses and unknown(run.losses[-1]) else entry["loss"])
                run.norms.append(entry.get("grad_norm") if case.tp == 1 else entry["grad_norm"])
    return trainer.model_wrapped


def unknown(loss: float | None) -> bool:
    return loss is None or math.isnan(loss)


def trainer_own(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
    logits = outputs.logits[:, -labels.shape[1] :]
    return own(logits[:, :-1], labels[:, 1:], num_items_in_batch)


class Rows(torch.utils.data.Dataset):
    """Micro-batches, ready as they are."""

    def __init__(self, micros: list[dict[str, torch.Tensor]]) -> None:
        self.micros = micros

    def __len__(self) -> int:
        return len(self.micros)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.micros[index]
