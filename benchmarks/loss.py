"""The fused loss against its peers: time, memory, collectives and bytes of head, loss and their backward.

    python -m benchmarks.loss                                    # this machine, sizes to suit
    python -m benchmarks.loss --tokens 8192 --hidden 4096 --vocab 128256 --tp 1 --dtype bfloat16
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 -m benchmarks.loss     # real ranks

Every peer gets the same inputs. Before it is timed its loss and gradients are compared with float32 truth (plain
autograd, some rows at a time); one that errs by more than ``--tolerance`` times plain PyTorch's error in the same
dtype is reported and not timed. Rounds are interleaved, the order turned each round; a figure is the median over
rounds, a ratio the median of the ratios round by round. Memory is the peak beyond inputs and gradients: of torch's
allocator on GPUs, of all tensors alive on CPU. Collectives are counted at torch.distributed; those that
``loss_parallel`` makes through DTensor are not seen there. With ``--tp`` above 1 and one process the group is torch's
fake one: shapes, times and memory of one rank of many, whose values cannot be checked. ``--out`` writes a dated JSON.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks.live_bytes import LiveBytes
from benchmarks.loss_peers import Peer, peers
from benchmarks.wire import circumstances, traffic
from tp_plugin.loss import VocabShard

PACKAGES = ("triton", "deepspeed", "liger-kernel", "cut-cross-entropy", "quack-kernels")
PRESETS = {
    "cpu": {"tokens": [2048], "hidden": 512, "vocab": [32000], "tp": [1], "dtype": "float32"},
    "cuda": {"tokens": [4096, 8192, 32768], "hidden": 4096, "vocab": [32000, 128256, 262144], "tp": [1, 2, 4, 8],
             "dtype": "bfloat16"},
    "smoke": {"tokens": [96], "hidden": 32, "vocab": [500], "tp": [1], "dtype": "float32"},
}  # fmt: skip


def main() -> None:
    args = arguments()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.is_available() else 0)
    device = device if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    world = int(os.environ.get("WORLD_SIZE", 1))
    results = []
    if world > 1:
        start_real_group()
        args.tp = [world]
    for tokens, vocab, tp in itertools.product(args.tokens, args.vocab, args.tp):
        if world == 1 and tp > 1:
            start_fake_group(tp)
        group = dist.group.WORLD if tp > 1 else None
        results.append(compare(args, device, tokens, vocab, tp, group, real=world > 1 or tp == 1))
        if dist.is_initialized() and world == 1:
            dist.destroy_process_group()
        if world == 1 or dist.get_rank() == 0:
            show(results[-1])
    report = {**circumstances(device, *PACKAGES), "setup": vars(args) | {"ranks": world}, "results": results}
    if args.out and (world == 1 or dist.get_rank() == 0):
        Path(args.out).write_text(json.dumps(report, indent=1, default=str) + "\n")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def start_real_group() -> None:
    import deepspeed

    import tp_plugin

    tp_plugin.register()  # so that on CPU nothing is compiled
    deepspeed.init_distributed()


def start_fake_group(tp: int) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tp)


def compare(
    args: argparse.Namespace, device: torch.device, tokens: int, vocab: int, tp: int, group: Any, real: bool
) -> dict[str, Any]:
    """Check, measure and time every peer at one size."""
    dtype = getattr(torch, args.dtype)
    inputs = problem(tokens, args.hidden, vocab, dtype, device, group)
    candidates, missing = peers(device, tp, vocab, real)
    if args.only:
        candidates = {name: peer for name, peer in candidates.items() if name in args.only}
    errors: dict[str, Any] = {}
    if real:
        truth = chunked_truth(*inputs, vocab, group)
        plain = plain_error(inputs, truth, vocab, group)
    measured: dict[str, dict[str, Any]] = {}
    for name, peer in list(candidates.items()):
        try:
            if real:
                errors[name] = error(run(peer, inputs, group), truth)
                if not errors[name] <= args.tolerance * plain + 1e-5:
                    raise ValueError(f"error {errors[name]:.1e}, plain PyTorch's {plain:.1e}")
            extra, wire = memory(peer, inputs, group, device)
            measured[name] = {"extra_bytes": extra, **wire}
        except Exception as failure:  # a peer that cannot, says so in the table
            missing[name] = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
            del candidates[name]
        gc.collect()
    times = rounds(args.rounds, candidates, inputs, group, device)
    flops = 6 * tokens * inputs[1].shape[0] * args.hidden
    for name, found in measured.items():
        found["seconds"] = round(statistics.median(times[name]), 6)
        found["tflops_of_6nvh"] = round(flops / found["seconds"] / 1e12, 3)
        found["relative_error"] = errors.get(name)
        pairs = zip(times["ours"], times[name], strict=True)
        found["ours_time_ratio"] = round(statistics.median(a / b for a, b in pairs), 3)
        found["ours_memory_ratio"] = round(measured["ours"]["extra_bytes"] / max(1, found["extra_bytes"]), 3)
    size = {"tokens": tokens, "hidden": args.hidden, "vocab": vocab, "tp": tp, "dtype": args.dtype}
    group_kind = "none" if group is None else dist.get_backend()
    return {**size, "group": group_kind, "peers": measured, "not_run": missing}


def problem(
    tokens: int, hidden: int, vocab: int, dtype: torch.dtype, device: torch.device, group: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, this rank's rows and labels of which a tenth is ignored; the same on every rank."""
    random = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, hidden, device=device, dtype=torch.float32, generator=random)
    shard = VocabShard.balanced(vocab, group)
    weight = torch.empty(shard.rows, hidden, device=device, dtype=dtype)
    for start in range(0, vocab, 4096):  # all ranks draw all rows and keep their own
        rows = torch.randn(min(4096, vocab - start), hidden, device=device, generator=random) * hidden**-0.5 * 2
        low, high = max(start, shard.start), min(start + len(rows), shard.stop)
        if low < high:
            weight[low - shard.start : high - shard.start] = rows[low - start : high - start]
    labels = torch.randint(0, vocab, (tokens,), device=device, generator=random)
    labels[::10] = -100
    return x.to(dtype).requires_grad_(), weight.requires_grad_(), labels


def run(peer: Peer, inputs: tuple[torch.Tensor, ...], group: Any) -> list[torch.Tensor]:
    """Loss and gradients."""
    hidden, weight, labels = inputs
    with peer.around():
        loss = peer.loss(hidden, weight, labels, group)
        return [loss.detach(), *torch.autograd.grad(loss, [hidden, weight])]


def chunked_truth(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, vocab: int, group: Any) -> Any:
    """Loss, d hidden and d weight in float32 by plain autograd on gathered weights, some rows at a time."""
    whole = weight.detach().float()
    shard = VocabShard.balanced(vocab, group)
    if group is not None:
        parts = [torch.empty(size, whole.shape[1], device=whole.device) for size in shard.sizes]
        dist.all_gather(parts, whole, group=group)
        whole = torch.cat(parts)
    return by_rows(hidden.detach().float(), whole, labels, slice(shard.start, shard.stop))


def by_rows(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, own: slice) -> list[torch.Tensor]:
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    loss, count = torch.zeros((), device=hidden.device), (labels != -100).sum()
    for rows in torch.arange(len(labels), device=hidden.device).split(1024):
        part = F.cross_entropy((hidden[rows] @ weight.t()).float(), labels[rows], reduction="sum") / count
        part.backward()
        loss += part.detach()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [loss, hidden.grad, weight.grad[own]]


def plain_error(inputs: tuple[torch.Tensor, ...], truth: Any, vocab: int, group: Any) -> float:
    """What plain PyTorch errs by in the dtype of the inputs; in float32 nothing."""
    hidden, weight, labels = (x.detach() for x in inputs)
    if hidden.dtype == torch.float32 or group is not None:
        return 1e-5 if hidden.dtype == torch.float32 else 1e-2
    return error(by_rows(hidden.clone(), weight.clone(), labels, slice(None)), truth)


def error(found: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    """The largest relative error of loss and gradients."""
    return max(((a.float() - e).norm() / e.norm()).item() for a, e in zip(found, truth, strict=True))


def memory(
    peer: Peer, inputs: tuple[torch.Tensor, ...], group: Any, device: torch.device
) -> tuple[int, dict[str, int]]:
    """Peak bytes beyond inputs and gradients, and what travels."""
    gradients = sum(x.nbytes for x in inputs[:2])
    wire = traffic(lambda: run(peer, inputs, group))
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(peer, inputs, group)
        return torch.cuda.max_memory_allocated() - before - gradients, wire
    with LiveBytes().ignore(*inputs) as seen:
        run(peer, inputs, group)
    return seen.peak - gradients, wire


def rounds(
    count: int, candidates: dict[str, Peer], inputs: tuple[torch.Tensor, ...], group: Any, device: torch.device
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(count):
        names = list(candidates)
        turn = index % len(names) if names else 0
        for name in names[turn:] + names[:turn]:
            times[name].append(timed(lambda name=name: run(candidates[name], inputs, group), group, device))
    return times


def timed(work: Callable[[], object], group: Any, device: torch.device) -> float:
    """Seconds, the device idle and real ranks together at both ends."""

    def meet() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        if group is not None:
            dist.barrier()

    meet()
    start = time.perf_counter()
    work()
    meet()
    return time.perf_counter() - start


def show(result: dict[str, Any]) -> None:
    print({key: value for key, value in result.items() if key not in ("peers", "not_run")})
    for name, found in result["peers"].items():
        print(
            f"  {name:28} {found['seconds'] * 1e3:10.2f} ms  ours/it {found['ours_time_ratio']:6.3f}   "
            f"{found['extra_bytes'] / 2**20:9.1f} MiB  ours/it {found['ours_memory_ratio']:6.3f}   "
            f"{found['collectives']:3d} collectives {found['bytes'] / 2**20:8.2f} MiB   error {found['relative_error']}"
        )
    for name, reason in result["not_run"].items():
        print(f"  {name:28} not run: {reason}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--vocab", type=int, nargs="+")
    parser.add_argument("--tp", type=int, nargs="+")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tolerance", type=float, default=1.5)
    parser.add_argument("--only", nargs="+", help="names of peers; 'ours' must be among them")
    parser.add_argument("--out", help="also write the results to this JSON file")
    args = parser.parse_args()
    preset = PRESETS["smoke" if args.smoke else "cuda" if torch.cuda.is_available() else "cpu"]
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


if __name__ == "__main__":
    main()
