"""A plain Accelerate loop that saves its state, or goes on from it; it knows nothing of tp_plugin.

resume_loop.py save|load OUT ROWS: ROWS samples a rank that reads others; writes OUT/save.json or OUT/load.json
"""

import argparse
import json

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from tests.support import tiny

parser = argparse.ArgumentParser()
parser.add_argument("what", choices=("save", "load"))
parser.add_argument("out")
parser.add_argument("rows", type=int)
parser.add_argument("--local_rank", type=int)
options = parser.parse_args()

set_seed(5)
accelerator = Accelerator(step_scheduler_with_optimizer=False)  # else once for each rank that reads other samples
model = tiny.model(seed=0 if options.what == "save" else 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.0)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
train = torch.utils.data.DataLoader(tiny.Samples(24), batch_size=options.rows)
model, optimizer, train, scheduler = accelerator.prepare(model, optimizer, train, scheduler)
found = {"losses": [], "rates": []}


def step(batch):
    # over a number of tokens that follows the rows, so that the mean over ranks is the same for any number of them
    loss = model(**batch, num_items_in_batch=torch.tensor(10.0 * options.rows)).loss
    accelerator.backward(loss)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    found["losses"].append(accelerator.reduce(loss.detach(), "mean").item())
    found["rates"].append(scheduler.get_last_lr()[0])


def draws():
    """What each rank draws next."""
    every = [None] * accelerator.state.num_processes
    torch.distributed.all_gather_object(every, torch.rand(()).item())
    return every


done = 0
if options.what == "load":
    accelerator.load_state(f"{options.out}/state")
    found["draws"] = draws()
    done = 2
else:
    torch.manual_seed(7 + accelerator.process_index // 2)  # one for each data-parallel rank
for number, batch in enumerate(accelerator.skip_first_batches(train, done), done):
    if options.what == "save" and number == 2:
        accelerator.save_state(f"{options.out}/state")
        found["draws"] = draws()
    step(batch)
if accelerator.is_main_process:
    with open(f"{options.out}/{options.what}.json", "w") as file:
        json.dump(found, file)
accelerator.wait_for_everyone()
accelerator.end_training()
