"""A plain script of HF Trainer with a loss of its own, which reads the head's weight: right on one GPU.

own_loss.py --out folder
"""

import argparse

import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from tests.support import tiny
from tests.support.launching import deepspeed_config

parser = argparse.ArgumentParser()
parser.add_argument("--out", required=True)
parser.add_argument("--stage", type=int, default=1)
options = parser.parse_args()


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        bare = self.accelerator.unwrap_model(model)
        hidden = bare.model(input_ids=inputs["input_ids"]).last_hidden_state[:, :-1]
        weight = bare.lm_head.weight
        loss = F.cross_entropy((hidden @ weight.T).flatten(0, 1), inputs["labels"][:, 1:].flatten() % 60)
        return (loss, None) if return_outputs else loss


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


arguments = TrainingArguments(
    output_dir=options.out, deepspeed=deepspeed_config(options.stage), per_device_train_batch_size=2, max_steps=2,
    logging_steps=1, report_to="none", disable_tqdm=True, save_strategy="no",
)  # fmt: skip
OwnLoss(model=tiny.model(), args=arguments, train_dataset=tiny.Samples(16), data_collator=collate).train()
print("it trained", flush=True)
