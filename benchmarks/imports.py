"""CPU seconds of ``import tp_plugin`` after ``import torch``, and of ``register()`` after the libraries it patches.

    OMP_NUM_THREADS=1 python -m benchmarks.imports [--rounds 9] [--out FILE]

Each round starts one process for each; a process measures itself. Modules that a training script imports anyway
(Trainer, PeftModel, the engine) are imported before ``register()``, all others count. ``--out`` writes a dated JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.wire import circumstances

TORCH = "import torch, torch.distributed"
LIBRARIES = (
    "import deepspeed, accelerate, transformers, peft; "
    "from transformers import AutoModelForCausalLM, Trainer, TrainingArguments; "
    "from transformers.generation import GenerationMixin; from peft import PeftModel"
)
MEASURED = {
    "import torch": ("", TORCH),
    "import tp_plugin after torch": (TORCH, "import tp_plugin"),
    "import the libraries after torch": (TORCH, LIBRARIES),
    "register() after the libraries": (f"{TORCH}; {LIBRARIES}; import tp_plugin", "tp_plugin.register()"),
}


def seconds(before: str, statement: str) -> float:
    """CPU seconds of ``statement`` in a new process that has run ``before``; an import waits for nothing."""
    code = f"{before}\nimport time\nbegan = time.process_time()\n{statement}\nprint(time.process_time() - began)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="processes for each (9)")
    parser.add_argument("--out", type=Path, help="a JSON file (none)")
    options = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in MEASURED}
    for _ in range(options.rounds):
        for name, (before, statement) in MEASURED.items():
            found[name].append(seconds(before, statement))
    result = {
        **circumstances(torch.device("cpu"), "deepspeed", "accelerate", "transformers", "peft"),
        "rounds": options.rounds,
        "median_cpu_seconds": {name: round(statistics.median(times), 3) for name, times in found.items()},
        "least_cpu_seconds": {name: round(min(times), 3) for name, times in found.items()},
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
