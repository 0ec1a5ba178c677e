"""Collectives of one training step of a sharded model."""

from __future__ import annotations

import torch.distributed as dist

from tests.support.models import batch, make
from tp_plugin.collectives import counted
from tp_plugin.config import TensorParallelConfig
from tp_plugin.mesh import ParallelMesh
from tp_plugin.sharding import shard_in_place


def sharded(family: str = "Llama", *, tp: int | None = None, **options):
    """A small model sharded over the whole world, in training mode."""
    tp = tp or dist.get_world_size()
    model = make(family, **options).train()
    shard_in_place(model, TensorParallelConfig(tp_size=tp, check_batch_every=0), ParallelMesh.create(tp))
    return model


def collectives(family, layers, heads, stage, checkpointing=False):
    """(purpose, backward) -> count of one training step."""
    model = make(family, heads=heads, num_hidden_layers=layers).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    if stage is None:
        shard_in_place(model, TensorParallelConfig(tp_size=2, check_batch_every=0), ParallelMesh.create(2))
        run = model
    else:
        from tests.support.configs import config_for
        from tests.support.train import engine_for, optimizer_for

        config = config_for(2, stage) | {"tp_plugin": {"check_batch_every": 0, "quiet": True}}
        run = engine_for(model, optimizer_for(model, "adamw"), config)
    data = batch(0, 2)
    for _ in range(4):  # the first steps are compared by the guard, the fourth is not
        with counted() as counter:
            loss = run(**data).loss
            run.backward(loss) if stage is not None else loss.backward()
    found: dict[tuple[str, bool], int] = {}
    for record in counter.records:
        key = record.purpose, record.backward
        found[key] = found.get(key, 0) + 1
    return found
