"""Engines, and checkpoints of theirs that are spoilt before they are loaded."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from tests.support import resume
from tests.support.configs import config_for
from tests.support.models import make
from tests.support.train import engine_for
from tp_plugin.errors import TensorParallelError


def engine(stage: int = 1, **options):
    return resume.engine_of(2, stage, family="Llama", heads=(4, 2), tied=False, **options)


def everywhere() -> str:
    """A directory that all ranks see."""
    where = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(where)
    return where[0]


def first(action) -> None:
    """On one rank, and the others wait."""
    if dist.get_rank() == 0:
        action()
    dist.barrier()


def mark(trained) -> str:
    """A hash of this rank's weights, master weights and optimizer state."""
    digest = hashlib.sha256()
    for param in trained.module.parameters():
        digest.update(param.detach().numpy().tobytes())
    state = trained.optimizer.optimizer.state
    for flat in trained.optimizer.single_partition_of_fp32_groups:
        digest.update(flat.detach().numpy().tobytes())
        digest.update(repr(sorted((k, v.sum().item()) for k, v in state.get(flat, {}).items())).encode())
    return digest.hexdigest()


def spoilt(spoil, *, tag=None, make_engine=engine, saved=engine) -> None:
    """Save twice, spoil the newer one, load it: raises, and leaves the engine as it was."""
    folder = everywhere()
    one = saved()
    resume.train(one, 2, (0,), "Llama")
    one.save_checkpoint(folder)
    resume.train(one, 2, (1,), "Llama")
    one.save_checkpoint(folder)
    first(lambda: spoil(Path(folder, "global_step2")))
    other = make_engine()
    before = mark(other)
    try:
        other.load_checkpoint(folder, tag)
    except TensorParallelError as refused:
        assert mark(other) == before, "the engine was touched"
        raise TensorParallelError(str(refused).replace(folder, "FOLDER")) from None
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder)


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)


def base() -> dict:
    return config_for(2, 1, gradient_accumulation_steps=1, tp_plugin={"quiet": True})


def frozen_engine():
    model = make("Llama", tied=False)
    model.model.embed_tokens.requires_grad_(False)
    trained = [param for param in model.parameters() if param.requires_grad]
    return engine_for(model, torch.optim.AdamW(trained, 0.1), base())
