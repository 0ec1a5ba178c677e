"""Engines whose first step is guarded, and a look at what the guard compares."""

from __future__ import annotations

import contextlib

import torch.distributed as dist

import tp_plugin
from tests.support.adapters import adapt
from tests.support.configs import config_for
from tests.support.train import engine_for, loss_of, micro_batches, model_of, optimizer_for
from tp_plugin.step_guard import comparison
from tp_plugin.step_guard.differences import relative


def engine_of(family, stage, extra=None, **options):
    extra = dict(extra or {})
    block = {"quiet": True, "check_batch_every": 2, **extra.pop("tp_plugin", {})}
    adapter, late = options.pop("adapter", None), options.pop("late", False)
    model = model_of(family, **options)
    if late:
        tp_plugin.shard_model(model, tp_plugin.TensorParallelConfig(tp_size=2, quiet=True))
    model = adapt(model, adapter) if adapter else model
    return engine_for(model, optimizer_for(model, "adamw"), config_for(2, stage, **extra, tp_plugin=block))


def steps(engine, count, family="Llama", **changes):
    for step in range(count):
        for pieces in micro_batches(step, dist.get_world_size() // 2, family):
            engine.backward(loss_of(engine, pieces[dist.get_rank() // 2] | changes, step, family))
            engine.step()


@contextlib.contextmanager
def compared(seen):
    """``seen`` gets what the guard compares inside: by quantity the relative difference, "coarse" before its name."""
    original = comparison.first_mismatch

    def difference(ours, plain, *, coarse=False):
        kind = "coarse " if coarse else ""
        seen.update({f"{kind}{key}": relative(ours[key], plain[key]) for key in plain})
        return original(ours, plain, coarse=coarse)

    comparison.first_mismatch = difference
    try:
        yield
    finally:
        comparison.first_mismatch = original
