"""Compare an exported model with the trained one, in a process of plain transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tp_plugin.launch.data import Blocks
from tp_plugin.launch.recipe import Recipe

CHECK_TOKENS = 512  # of a held-out block, so that the full logits of a large vocabulary stay small
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}  # relative, of the exported model's loss
OF_LAUNCHERS = ("RANK", "LOCAL_", "WORLD_", "GROUP_", "ROLE_", "MASTER_", "CROSS_", "TORCHELASTIC_", "ACCELERATE_")


def reference(engine: Any, held_out: Blocks, count: int) -> dict[str, torch.Tensor]:
    """Losses and logits of the sharded model, which the exported one must repeat; a collective call.

    Returns:
        ``input_ids`` [blocks, tokens], ``loss`` [blocks], ``logits`` [blocks, tokens, vocabulary]; {} without blocks.
    """
    count = min(count, len(held_out))
    if not count:
        return {}
    ids = torch.stack([held_out[i]["input_ids"][:CHECK_TOKENS] for i in range(count)])
    losses, logits = [], []
    engine.eval()
    with torch.no_grad():
        for row in ids.to(engine.device).split(1):
            out = engine(input_ids=row, labels=row)
            losses.append(out.loss.float().cpu())
            logits.append(out.logits[0].cpu())
    return {"input_ids": ids, "loss": torch.stack(losses), "logits": torch.stack(logits)}


def visit_plainly(recipe: Recipe, expected: dict[str, torch.Tensor]) -> tuple[str, str | None]:
    """Load the export in a new process, outside the job, compare it and sample from it.

    Args:
        expected: the result of :func:`reference`.

    Returns:
        A report, and a sentence when the exported model is not the trained one, else None.
    """
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        if expected:
            save_file(expected, Path(folder, "reference.safetensors"))
        job = {
            "directory": recipe.output_dir,
            "reference": str(Path(folder, "reference.safetensors")) if expected else None,
            "prompt": recipe.sample.prompt,
            "max_new_tokens": recipe.sample.max_new_tokens,
            "seed": recipe.seed,
            "attn_implementation": recipe.model.attn_implementation,
            "trust_remote_code": recipe.model.trust_remote_code,
        }
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith((*OF_LAUNCHERS, "OMP_"))
        }
        if sum(file.stat().st_size for file in Path(recipe.output_dir).glob("*.safetensors")) < 2**28:
            environment["OMP_NUM_THREADS"] = "1"  # for a small model, threads that only wait for each other
        script = Path(__file__).with_name("export_check_worker.py")
        done = subprocess.run(
            [sys.executable, str(script), json.dumps(job)], env=environment, capture_output=True, text=True
        )
    if done.returncode:
        return "", f"plain transformers cannot load the exported {recipe.output_dir!r}:\n{done.stderr[-3000:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    lines, complaint = [], None
    if expected:
        trained, error, spread = expected["loss"].mean().item(), found["logits_error"], found["logits_max"]
        lines.append(
            f"loaded by plain transformers in one process: loss {found['loss']:.6f}, sharded {trained:.6f}; "
            f"logits differ by at most {error:.1e} of {spread:.1f}"
        )
        if not abs(found["loss"] - trained) <= TOLERANCE[getattr(torch, found["dtype"])] * abs(trained):
            complaint = (
                f"the exported model is not the trained one: on the same {len(expected['loss'])} held-out blocks its "
                f"loss is {found['loss']:.6f}, the sharded model's {trained:.6f}; do not use {recipe.output_dir!r}."
            )
    if found["sample"] is not None:
        lines.append(f"a sample from it:\n{found['sample']}")
    return "\n".join(lines), complaint
