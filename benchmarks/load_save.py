"""Loading a checkpoint on tp ranks and saving it again, against DeepSpeed AutoTP: whole on every rank, on one rank.

    python -m benchmarks.load_save [--gigabytes 2 --tp 4 --rounds 3] [--out result.json]

A Llama-like checkpoint in bfloat16 and several safetensors files is made on the fly. Each run is a launch of fresh
processes (gloo, CPU), ours and stock in turn, so that a noisy machine disturbs both alike; the files are in the page
cache for both. Both make an engine on the shards (``from_pretrained`` and ``deepspeed.initialize`` without an
optimizer) and save it in files of a sixteenth: ours by ``tp_plugin.save_pretrained``, stock by what
``Accelerator.get_state_dict`` asks of the engine, and ``save_pretrained`` on rank 0.

What is counted, for each rank, from the moment its libraries are imported and its groups are made:

- ``peak``: how far the largest resident set (VmHWM, reset at the start) rose; ``..._of_loading``: before the engine. It
  holds anonymous memory and the pages of files that are mapped. Of these the kernel has one copy for all ranks, so
- ``peak_anonymous`` is given too: the same for RssAnon, sampled every 2 ms.
- ``saving``: the same two, from the moment before the save.
- ``held``: bytes of the parameters in the end.
- ``read``: bytes taken out of the files. Ours are the slices that were asked for, counted in the reader, and
  ``by_system_calls`` (rchar of /proc/self/io) has those of them that were not mapped. transformers maps files and reads
  a tensor when it is used: for stock it is the mapped pages that came into a rank's memory (RssFile).
- ``touched``: bytes of the pages that ``read`` lies in; ours only. Columns of a matrix lie in nearly all of its pages,
  so all ranks together touch more than the file. The ranks of one host share its page cache, and its disk is read once;
  a host that holds some of the ranks takes its ranks' pages from the disk, and what the system reads ahead besides.

In the checkpoint's own dtype transformers' whole model is a mapping, of which AutoTP copies out shards; in another
(``--dtype float32``) every rank holds a whole copy.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from benchmarks.wire import circumstances

WAYS = ("autotp", "tp_plugin")


def main() -> None:
    args = arguments()
    if args.rank_of:
        rank(args)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        size = write_checkpoint(Path(folder, "model"), args)
        found: dict[str, list[list[dict]]] = {way: [] for way in WAYS}
        for index in range(args.rounds):
            for way in WAYS if index % 2 else WAYS[::-1]:
                found[way].append(launch(way, folder, args))
                print(way, found[way][-1][0], file=sys.stderr, flush=True)
    report(args, size, found)


def write_checkpoint(folder: Path, args: argparse.Namespace) -> int:
    """Config, index and files of a Llama of about ``args.gigabytes``; the bytes of its tensors."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, vocabulary = args.hidden, args.vocabulary
    layer = 2 * (2 * hidden * hidden + 2 * hidden * hidden // 4 + 3 * hidden * hidden * 11 // 4)
    layers = max(1, round((args.gigabytes * 1e9 - 4 * hidden * vocabulary) / layer))
    heads = hidden // 64
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 4, dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    noise = torch.randn(1 << 20).mul_(0.02).bfloat16()
    files: list[dict[str, torch.Size]] = [{}]
    for name, shape in shapes.items():
        if sum(one.numel() for one in files[-1].values()) * 2 > args.gigabytes * 1e9 / 8:
            files.append({})
        files[-1][name] = shape
    where = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = {
            name: noise.repeat(-(-shape.numel() // noise.numel()))[: shape.numel()].view(shape).clone()
            for name, shape in names.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    total = 2 * sum(shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def launch(way: str, folder: str, args: argparse.Namespace) -> list[dict]:
    """One run on fresh processes; what each rank found."""
    command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={args.tp}", "-m", "benchmarks.load_save"]
    subprocess.run(
        [
            sys.executable,
            "-m",
            *command,
            "--rank-of",
            way,
            "--folder",
            folder,
            "--tp",
            str(args.tp),
            "--dtype",
            args.dtype,
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(args.tp)]


def rank(args: argparse.Namespace) -> None:
    """What a process of :func:`launch` does: load, make an engine, and write down what it took."""
    import deepspeed
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  (imported before the count begins)
    from transformers.utils import logging

    import tp_plugin
    from tp_plugin.weights.reader import Reader

    logging.disable_progress_bar()
    folder, ours = Path(args.folder, "model"), args.rank_of == "tp_plugin"
    tp_plugin.register()  # so that on CPU both run over plain gloo and nothing is compiled
    if not ours:
        tp_plugin.unregister()
        deepspeed.comm.torch.build_shm_op = lambda: None
    deepspeed.init_distributed("gloo")
    setup = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": args.dtype == "bfloat16"},
        "tensor_parallel": {"autotp_size": args.tp},
        **({"tp_plugin": {"quiet": True}} if ours else {}),
    }
    readers: list[Reader] = []
    opened = Reader.open
    Reader.open = lambda *given, **more: readers.append(opened(*given, **more)) or readers[-1]  # type: ignore[method-assign]
    dist.barrier()
    with Memory() as memory:
        start, calls = time.perf_counter(), rchar()
        if ours:
            model = tp_plugin.from_pretrained(
                folder, tp_size=args.tp, dtype=args.dtype, model_class=AutoModelForCausalLM
            )
            read = sum(reader.bytes_read for reader in readers)
            touched = sum(reader.bytes_touched for reader in readers)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=args.dtype)
            read = touched = None
        loaded, loading = time.perf_counter(), memory.risen()
        engine, *_ = deepspeed.initialize(model=model, config=setup)
        dist.barrier()
        done = time.perf_counter()
        calls, risen = rchar() - calls, memory.risen()
    ids = torch.arange(1, 17)[None]
    with torch.no_grad():
        loss = engine(input_ids=ids, labels=ids).loss.item()
    dist.barrier()
    with Memory() as memory:
        start_of_saving = time.perf_counter()
        piece = f"{round(args.gigabytes * 62.5)}MB"
        if ours:
            tp_plugin.save_pretrained(engine, Path(args.folder, "saved"), max_shard_size=piece)
        else:
            state = engine._consolidated_16bit_state_dict()
            if dist.get_rank() == 0:
                engine.module.save_pretrained(Path(args.folder, "saved"), state_dict=state, max_shard_size=piece)
            del state
        dist.barrier()
        saving, saved = memory.risen(), time.perf_counter() - start_of_saving
    found = {
        **risen,
        "peak_of_saving": saving["peak"],
        "peak_anonymous_of_saving": saving["peak_anonymous"],
        "save_seconds": saved,
        **{f"{name}_of_loading": size for name, size in loading.items()},
        "held": sum(parameter.nbytes for parameter in engine.module.parameters()),
        "read": risen["mapped"] if read is None else read,
        "touched": touched,
        "read_by_system_calls": calls,
        "load_seconds": loaded - start,
        "seconds": done - start,
        "loss": loss,
    }
    Path(args.folder, f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


class Memory:
    """How far this process's resident memory rises inside of the ``with`` block, in bytes."""

    def __enter__(self) -> Memory:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew at the present size
        self._start = status()
        self._most, self._over = dict(self._start), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def risen(self) -> dict[str, int]:
        """So far; to be asked inside of the block."""
        return {
            "peak": status()["VmHWM"] - self._start["VmRSS"],
            "peak_anonymous": self._most["RssAnon"] - self._start["RssAnon"],
            "mapped": self._most["RssFile"] - self._start["RssFile"],
        }

    def _sample(self) -> None:
        while not self._over.wait(0.002):
            now = status()
            self._most = {name: max(size, now[name]) for name, size in self._most.items()}


def status() -> dict[str, int]:
    """The sizes of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return {name: int(size) << 10 for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.M)}


def rchar() -> int:
    """Bytes that this process's system calls have read."""
    return int(Path("/proc/self/io").read_text().split()[1])


def report(args: argparse.Namespace, size: int, found: dict[str, list[list[dict]]]) -> None:
    ways = {}
    for way, runs in found.items():
        ranks = [one for run in runs for one in run]
        ways[way] = {
            "peak_of_the_worst_rank": max(one["peak"] for one in ranks),
            **{
                f"{name}_over_checkpoint": round(max(one[name] for one in ranks) / size, 3)
                for name in ("peak", "peak_anonymous", "peak_of_loading", "peak_anonymous_of_loading", "held")
                + ("peak_of_saving", "peak_anonymous_of_saving")
            },
            "read_by_all_over_checkpoint": round(max(sum(one["read"] for one in run) for run in runs) / size, 3),
            **(
                {"touched_by_all_over_checkpoint": round(sum(one["touched"] for one in runs[0]) / size, 3)}
                if runs[0][0]["touched"] is not None
                else {}
            ),
            "of_it_by_system_calls": round(
                max(sum(one["read_by_system_calls"] for one in run) for run in runs) / size, 3
            ),
            "load_seconds": round(statistics.median(max(one["load_seconds"] for one in run) for run in runs), 2),
            "peak_of_saving_mib": round(max(one["peak_of_saving"] for one in ranks) / 2**20),
            "save_seconds": round(statistics.median(max(one["save_seconds"] for one in run) for run in runs), 2),
            "seconds": round(statistics.median(max(one["seconds"] for one in run) for run in runs), 2),
            "loss": ranks[0]["loss"],
        }
    result = {
        **circumstances(torch.device("cpu"), "deepspeed", "transformers", "safetensors"),
        "setup": {name: value for name, value in vars(args).items() if name not in ("rank_of", "folder", "out")},
        "checkpoint_bytes": size,
        "results": ways,
    }
    print(json.dumps(result, indent=2))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=2) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint")
    for name, default in (("tp", 4), ("rounds", 3), ("hidden", 2048), ("vocabulary", 32000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="what it is loaded in")
    parser.add_argument("--folder", help="where to make the checkpoint; default: the temporary directory")
    parser.add_argument("--out", help="also write the result to this JSON file")
    parser.add_argument("--rank-of", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
