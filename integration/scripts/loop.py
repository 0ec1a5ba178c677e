"""A hand-written Accelerate training loop that knows nothing of tp_plugin.

loop.py OUT: writes OUT/RANK.json and, from rank 0, OUT/model
"""

import argparse
import json
import os

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import gather, gather_object, reduce, set_seed
from transformers import AutoModelForCausalLM

from tests.support import tiny

parser = argparse.ArgumentParser()
parser.add_argument("out")
parser.add_argument("--start")
parser.add_argument("--local_rank", type=int)
options = parser.parse_args()

accelerator = Accelerator()
rank, found = accelerator.process_index, {}
set_seed(5)


def say(name, value):
    found[name] = value.tolist() if torch.is_tensor(value) else value


# collecting, before anything is prepared
mine = torch.tensor([float(rank)], device=accelerator.device)
say("gather", accelerator.gather(mine))
say("gather_nested", [t.tolist() for t in accelerator.gather({"a": mine, "b": (mine[0], mine[None])})["b"]])
say("sum", accelerator.reduce(mine, "sum"))
say("mean", accelerator.reduce(mine, "mean"))
say("max", accelerator.reduce(mine, "max"))
say("function_gather", gather({"a": mine})["a"])
say("function_objects", gather_object([f"rank {rank}"]))
say("function_sum", reduce(mine, "sum"))
say("function_mean", reduce([mine])[0])
say("function_max", reduce(mine, "max"))
with PartialState().split_between_processes(["a", "b", "c"]) as share:
    say("share", share)
with accelerator.split_between_processes(["a", "b", "c"], apply_padding=True) as share:
    say("padded_share", share)
if rank == 3:  # any one rank may ask all to stop
    accelerator.set_trigger()
say("triggered", accelerator.check_trigger())

model = AutoModelForCausalLM.from_pretrained(options.start).train() if options.start else tiny.model()
say("head_rows", len(model.lm_head.weight))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.0)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
train = torch.utils.data.DataLoader(tiny.Samples(24), batch_size=2, shuffle=True)
evaluation = torch.utils.data.DataLoader(tiny.Samples(7, offset=30), batch_size=2)
model, optimizer, train, evaluation, scheduler = accelerator.prepare(model, optimizer, train, evaluation, scheduler)

groups = len(dist.distributed_c10d._world.pg_map)
for _ in range(3):
    accelerator.prepare(torch.utils.data.DataLoader(tiny.Samples(7), batch_size=2))
say("new_groups", len(dist.distributed_c10d._world.pg_map) - groups)


def steps(batches):
    losses, read = [], []
    for batch in batches:
        read.append(batch["input_ids"][:, 0].tolist())
        output = model(**batch)
        loss = output.loss
        logits = accelerator.gather_for_metrics(output.logits)  # while training, with gradients to come
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    found.setdefault("training_logits", list(logits.shape))
    return {"losses": losses, "read": read, "lr": scheduler.get_last_lr()[0]}


batches = list(train)
model.train()
say("first", steps(batches[:2]))
accelerator.save_state(f"{options.out}/state")
say("straight", steps(batches[2:4]))
accelerator.load_state(f"{options.out}/state")
say("again", steps(batches[2:4]))

model.eval()
numbers, objects, forced, shapes, guesses = [], [], [], [], []
for batch in evaluation:
    with torch.no_grad():
        logits = model(**batch).logits
    ids = batch["input_ids"][:, 0]
    everyone = accelerator.gather_for_metrics({"logits": logits, "ids": ids})
    numbers += everyone["ids"].tolist()
    shapes.append(list(everyone["logits"].shape))
    guesses += everyone["logits"].argmax(-1).tolist()
    objects += accelerator.gather_for_metrics([f"sample {number}" for number in ids.tolist()])
    forced += [t.item() for t in accelerator.gather_for_metrics(list(ids), use_gather_object=True)]
say("numbers", numbers)
say("shapes", shapes)
say("guesses", guesses)
say("objects", objects)
say("forced", forced)

state = accelerator.get_state_dict(model)
say("state_keys", len(state))
accelerator.unwrap_model(model).save_pretrained(
    f"{options.out}/model", state_dict=state, is_main_process=accelerator.is_main_process
)

# a stream, read by rank 0 and dealt out
stream = torch.utils.data.DataLoader(tiny.Stream(11), batch_size=2)
stream = accelerator.prepare(stream)
dealt, collected = [], []
for batch in stream:
    dealt.append(batch["input_ids"][:, 0].tolist())
    collected += accelerator.gather_for_metrics(batch["input_ids"][:, 0]).tolist()
say("dealt", dealt)
say("collected", collected)

with open(os.path.join(options.out, f"{rank}.json"), "w") as file:
    json.dump(found, file)
accelerator.wait_for_everyone()
accelerator.end_training()
