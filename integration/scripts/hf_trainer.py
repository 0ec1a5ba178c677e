"""A plain HF Trainer script that knows nothing of tp_plugin: several short trainings in one set of processes.

hf_trainer.py --variants variants.json --out folder
"""

import argparse
import json
import os

import numpy as np
import torch
from accelerate.utils import set_seed
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from tests.support import tiny

parser = argparse.ArgumentParser()
parser.add_argument("--variants", required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--local_rank", type=int)
options = parser.parse_args()
RANK = int(os.environ["RANK"])


class Notes(TrainerCallback):
    """Which samples this rank has read, and what it draws after seeding."""

    def __init__(self):
        self.batches, self.draw = [], None

    def collate(self, rows):
        columns = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        self.batches.append(columns["input_ids"][:, 0].tolist())
        return columns

    def on_train_begin(self, args, state, control, **kwargs):
        self.draw = torch.rand(2).tolist()


def train(name, *, tied=False, deepspeed=None, device_specific=False, resume=None, evaluate=False, save=False, **args):
    start = args.pop("start", None)
    folder, notes = f"{options.out}/{name}", Notes()
    model = None if start else tiny.model(tied=tied)
    arguments = TrainingArguments(
        output_dir=folder, deepspeed=deepspeed, per_device_train_batch_size=2, per_device_eval_batch_size=2,
        learning_rate=1e-2, adam_epsilon=1e-4, max_grad_norm=0.5, weight_decay=0.0,
        logging_steps=1, report_to="none", disable_tqdm=True, include_num_input_tokens_seen="all",
        **({"save_strategy": "no", "lr_scheduler_type": "constant"} | args),
    )  # fmt: skip
    if start:  # the order HF documents for ZeRO-3
        model = AutoModelForCausalLM.from_pretrained(f"{options.out}/{start}")
    result = {"rank": RANK, "world": arguments.world_size, "kind": str(arguments.distributed_state.distributed_type)}

    def compute_metrics(found):
        if RANK == 0:
            np.savez(f"{folder}/predictions.npz", logits=found.predictions, labels=found.label_ids, seen=found.inputs)
        return {"rows": len(found.predictions), "columns": found.predictions.shape[-1]}

    arguments.include_for_metrics = ["inputs"]
    trainer = Trainer(
        model=model, args=arguments, train_dataset=tiny.Samples(24), eval_dataset=tiny.Samples(7, offset=30),
        data_collator=notes.collate, callbacks=[notes], compute_metrics=compute_metrics,
    )  # fmt: skip
    if device_specific:
        set_seed(7, device_specific=True)
    trainer.train(resume_from_checkpoint=resume and f"{options.out}/{resume}")
    result |= {"batches": list(notes.batches), "draw": notes.draw, "tokens": trainer.state.num_input_tokens_seen}
    if evaluate:
        result["metrics"] = trainer.evaluate()
        result["predicted"] = list(trainer.predict(tiny.Samples(5)).predictions.shape)
    if save:
        trainer.save_model(f"{folder}/model")
    result["log"] = trainer.state.log_history
    with open(f"{options.out}/{name}.{RANK}.json", "w") as file:
        json.dump(result, file)


with open(options.variants) as file:
    for variant in json.load(file):
        train(**variant)
