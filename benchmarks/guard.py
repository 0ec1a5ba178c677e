"""Cost of the guard of the first step, as a share of a run of 1000 steps.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 -m benchmarks.guard [--layers 4 --hidden 512 ...]

One engine; plain steps alternate with steps that are checked on request as the first one is (loss and outputs against
the plain twin, gradients, replicas). What a check adds to the median step is reported, and as a share of 1000 steps,
together with the replica checks of such a run. ``--out`` writes a dated JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

import tp_plugin
from benchmarks.step_time import arguments, engine, step, timed
from benchmarks.wire import circumstances
from tp_plugin.step_guard.guard import guard_of
from tp_plugin.step_guard.replicas import is_turn, require_equal_replicas

STEPS, EVERY = 1000, 500


def main() -> None:
    args = arguments()
    tp_plugin.register()
    deepspeed.init_distributed()
    device = torch.device(deepspeed.get_accelerator().current_device_name())
    run = engine(args, dist.get_world_size(), plugin=True)
    guard = guard_of(run)
    data = torch.randint(0, args.vocabulary, (args.rows, args.length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": data.to(device), "labels": data.to(device)}
    for _ in range(args.warmup + 2):
        step(run, batch)
    plain, checked, replicas = [], [], []
    for _ in range(args.steps):
        plain.append(timed(lambda: step(run, batch)))
        tp_plugin.check_next_step(run)
        checked.append(timed(lambda: step(run, batch)))
        step(run, batch)  # the step in which the gradients are looked at
        replicas.append(timed(lambda: require_equal_replicas(run.module, guard.mesh)))
    if dist.get_rank() == 0:
        report(args, device, plain, checked, replicas)
    dist.barrier()
    dist.destroy_process_group()


def report(args: argparse.Namespace, device: torch.device, plain: list, checked: list, replicas: list) -> None:
    usual, once, again = (statistics.median(times) for times in (plain, checked, replicas))
    turns = sum(is_turn(forwards, EVERY) for forwards in range(STEPS))
    result = {
        **circumstances(device, "deepspeed", "transformers"),
        "setup": vars(args) | {"tp": dist.get_world_size(), "backend": dist.get_backend()},
        "median_seconds": {"step": round(usual, 4), "checked step": round(once, 4), "replicas": round(again, 4)},
        "a_check_in_steps": round((once - usual) / usual, 2),
        "share_of_1000_steps": round((once - usual + turns * again) / (STEPS * usual), 5),
    }
    print(json.dumps(result, indent=2, default=str))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
