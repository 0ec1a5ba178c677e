"""Time of a training step: tp_plugin against DeepSpeed's own AutoTP, interleaved in one run.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 -m benchmarks.step_time [--layers 4 --hidden 512 ...]

Both engines live in the same processes, on the same groups, with the same model, batch and optimizer; their steps
alternate, so that a noisy machine disturbs both alike. Reported are the median of the step times, the median of the
ratios step by step, and this rank's bytes on the wire a step, counted at torch.distributed. Works on CPU (gloo) and on
GPUs (nccl). ``--out`` writes a dated JSON with machine and versions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tp_plugin
from benchmarks.wire import circumstances, traffic


def main() -> None:
    args = arguments()
    tp_plugin.register()  # first, so that on CPU both run over plain gloo and nothing is compiled
    deepspeed.init_distributed()
    device = torch.device(deepspeed.get_accelerator().current_device_name())
    size = dist.get_world_size()
    stock, ours = engine(args, size, plugin=False), engine(args, size, plugin=True)
    data = torch.randint(0, args.vocabulary, (args.rows, args.length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": data.to(device), "labels": data.to(device)}
    losses = {"autotp": step(stock, batch).item(), "tp_plugin": step(ours, batch).item()}
    for _ in range(args.warmup):
        step(stock, batch), step(ours, batch)
    wire = {name: traffic(lambda run=run: step(run, batch)) for name, run in (("autotp", stock), ("tp_plugin", ours))}
    times: dict[str, list[float]] = {"autotp": [], "tp_plugin": []}
    for index in range(args.steps):
        pairs = [("autotp", stock), ("tp_plugin", ours)]
        for name, run in pairs if index % 2 else reversed(pairs):
            times[name].append(timed(lambda run=run: step(run, batch)))
    if dist.get_rank() == 0:
        report(args, device, losses, times, wire)
    dist.barrier()
    dist.destroy_process_group()


def engine(args: argparse.Namespace, tp: int, plugin: bool) -> deepspeed.DeepSpeedEngine:
    """The same model and optimizer behind either implementation of the slot."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(args.hidden // 128, tp),
    )
    model = LlamaForCausalLM(config)
    setup = {
        "train_micro_batch_size_per_gpu": args.rows,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": args.bf16},
        "zero_allow_untested_optimizer": True,
        "tensor_parallel": {"autotp_size": tp},
    }
    tp_plugin.register() if plugin else tp_plugin.unregister()
    if plugin:
        setup["tp_plugin"] = {"quiet": True}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=setup)[0]


def step(run: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    loss = run(**batch).loss
    run.backward(loss)
    run.step()
    return loss.detach()


def timed(work: Callable[[], object]) -> float:
    """Seconds on this rank, all ranks starting together and the device idle at both ends."""
    accelerator = deepspeed.get_accelerator()
    accelerator.synchronize()
    dist.barrier()
    start = time.perf_counter()
    work()
    accelerator.synchronize()
    dist.barrier()
    return time.perf_counter() - start


def report(args, device, losses, times, wire) -> None:  # type: ignore[no-untyped-def]
    ratios = sorted(ours / stock for ours, stock in zip(times["tp_plugin"], times["autotp"], strict=True))
    result = {
        **circumstances(device, "deepspeed", "transformers"),
        "setup": vars(args) | {"tp": dist.get_world_size(), "backend": dist.get_backend()},
        "first_loss": losses,
        "median_seconds": {name: round(statistics.median(values), 4) for name, values in times.items()},
        "ratio": {
            "median": round(statistics.median(ratios), 3),
            "min": round(ratios[0], 3),
            "max": round(ratios[-1], 3),
        },
        "a_step_on_rank_0": wire,
    }
    print(json.dumps(result, indent=2, default=str))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=2, default=str) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("layers", 4), ("hidden", 512), ("vocabulary", 8192), ("rows", 2), ("length", 256), ("steps", 20), ("warmup", 2)
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--out", help="also write the result to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
