"""A plain script of HF Trainer and PEFT that knows nothing of tp_plugin.

lora_trainer.py --out folder --zero 1
"""

import argparse
import json
import os

import torch
from transformers import Trainer, TrainingArguments

from tests.support import tiny
from tests.support.launching import deepspeed_config

parser = argparse.ArgumentParser()
parser.add_argument("--out", required=True)
parser.add_argument("--zero", type=int, nargs="+")
options = parser.parse_args()

for stage in options.zero:
    read: list[list[int]] = []

    def collate(rows, read=read):
        columns = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        read.append(columns["input_ids"][:, 0].tolist())
        return columns

    folder = f"{options.out}/{stage}"

    def trainer_of(collate=collate, stage=stage, folder=folder):
        arguments = TrainingArguments(
            output_dir=folder, deepspeed=deepspeed_config(stage), per_device_train_batch_size=2, max_steps=3,
            gradient_accumulation_steps=2, learning_rate=1e-2, adam_epsilon=1e-4, lr_scheduler_type="constant",
            max_grad_norm=0.05, weight_decay=0.0, logging_steps=1, report_to="none", disable_tqdm=True, save_steps=2,
            gradient_checkpointing=stage == 3,
        )  # fmt: skip
        return Trainer(
            model=tiny.adapted(), args=arguments, train_dataset=tiny.Samples(24), eval_dataset=tiny.Samples(4),
            data_collator=collate,
        )  # fmt: skip

    trainer = trainer_of()
    trainer.train()
    found = {"batches": list(read), "log": trainer.state.log_history, "evaluated": trainer.evaluate()["eval_loss"]}
    trainer.save_model(f"{folder}/adapter")
    resumed = trainer_of()
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    found["resumed"] = resumed.state.log_history
    with open(f"{folder}/{os.environ['RANK']}.json", "w") as file:
        json.dump(found, file)
