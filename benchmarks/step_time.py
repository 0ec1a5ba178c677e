"""Time of a training step: tp_plugin against DeepSpeed's AutoTP and transformers' own plan, interleaved in one run.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 -m benchmarks.step_time [--layers 4 --hidden 512 ...]

All three live in the same processes, on the same ranks, with the same model, batch and optimizer; their steps
alternate, so that a noisy machine disturbs them alike. "transformers" is ``from_pretrained(distributed_config=)``, the
tensor parallelism that accelerate's FSDP2 is put around; with one replica it is all there is.

Reported are the median of the step times, the median of the ratios step by step, and this rank's bytes on the wire a
step. These are counted at torch.distributed, where collectives of DTensors cannot be seen. Works on CPU (gloo) and on
GPUs (nccl). ``--out`` writes a dated JSON with machine and versions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import tp_plugin
from benchmarks.wire import circumstances, traffic


def main() -> None:
    args = arguments()
    tp_plugin.register()  # first, so that on CPU all run over plain gloo and nothing is compiled
    deepspeed.init_distributed()
    device = torch.device(deepspeed.get_accelerator().current_device_name())
    size = dist.get_world_size()
    runs = {"autotp": engine(args, size, plugin=False), "tp_plugin": engine(args, size, plugin=True)}
    runs = {"transformers": Native(args, size), **runs}
    data = torch.randint(0, args.vocabulary, (args.rows, args.length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": data.to(device), "labels": data.to(device)}
    losses = {name: step(run, batch).item() for name, run in runs.items()}
    for _ in range(args.warmup):
        for run in runs.values():
            step(run, batch)
    seen = {name: run for name, run in runs.items() if name != "transformers"}
    wire = {name: traffic(lambda run=run: step(run, batch)) for name, run in seen.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(args.steps):
        for name in [*runs] if index % 2 else reversed([*runs]):
            times[name].append(timed(lambda run=runs[name]: step(run, batch)))
    if dist.get_rank() == 0:
        report(args, device, losses, times, wire)
    dist.barrier()
    dist.destroy_process_group()


def model_of(args: argparse.Namespace, tp: int) -> LlamaForCausalLM:
    """The model that all train."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocabulary,
            hidden_size=args.hidden,
            intermediate_size=args.hidden * 11 // 4,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // 64,
            num_key_value_heads=max(args.hidden // 128, tp),
        )
    )


class Native:
    """The model sharded by transformers' plan, trained in a loop of torch."""

    def __init__(self, args: argparse.Namespace, tp: int) -> None:
        tp_plugin.unregister()
        folder = [tempfile.mkdtemp()]
        dist.broadcast_object_list(folder)
        if dist.get_rank() == 0:
            model_of(args, tp).save_pretrained(folder[0])
        dist.barrier()
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        self.model = LlamaForCausalLM.from_pretrained(folder[0], distributed_config={"tp_size": tp}, dtype=dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        tp_plugin.register()

    def __call__(self, **batch: torch.Tensor) -> Any:
        return self.model(**batch)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        params = [param for param in self.model.parameters() if param.grad is not None]
        kinds = [[one for one in params if isinstance(one, DTensor) is sharded] for sharded in (True, False)]
        norms = [torch.nn.utils.get_total_norm([one.grad for one in kind]) for kind in kinds]  # torch takes one kind
        total = torch.stack([norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]).norm()
        for kind in kinds:
            torch.nn.utils.clip_grads_with_norm_(kind, 1.0, total)
        self.optimizer.step()
        self.optimizer.zero_grad()


def engine(args: argparse.Namespace, tp: int, plugin: bool) -> deepspeed.DeepSpeedEngine:
    """The same model and optimizer behind either implementation of the slot."""
    model = model_of(args, tp)
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


def step(run: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
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
    result = {
        **circumstances(device, "deepspeed", "transformers"),
        "setup": vars(args) | {"tp": dist.get_world_size(), "backend": dist.get_backend()},
        "first_loss": losses,
        "median_seconds": {name: round(statistics.median(values), 4) for name, values in times.items()},
        "ratio_of_tp_plugin_to": {
            peer: spread(times["tp_plugin"], times[peer]) for peer in times if peer != "tp_plugin"
        },
        "a_step_on_rank_0": wire,
    }
    print(json.dumps(result, indent=2, default=str))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=2, default=str) + "\n")


def spread(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Median, least and largest of the ratios step by step."""
    ratios = sorted(one / other for one, other in zip(ours, theirs, strict=True))
    return {"median": round(statistics.median(ratios), 3), "min": round(ratios[0], 3), "max": round(ratios[-1], 3)}


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
