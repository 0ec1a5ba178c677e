"""A rank that fails alone while the guard computes the first step again: the others do not wait for it."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
import torch.distributed as dist

from tests.support.batched_cases import launched, values
from tests.support.configs import config_for
from tests.support.models import batch
from tests.support.train import engine_for, model_of, optimizer_for
from tp_plugin.step_guard import comparison, param_view
from tp_plugin.step_guard.guard import guard_of

SHORT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.20 GiB.")


def examined(stage: int, run=None) -> tuple[str, float]:
    """What we said on stderr, and the loss of the step after the guard's."""
    model = model_of("Llama")
    engine = engine_for(model, optimizer_for(model, "adamw"), config_for(2, stage, tp_plugin={"quiet": True}))
    with contextlib.redirect_stderr(io.StringIO()) as said:
        if run is not None:
            guard_of(engine).examine(run, batch(0, 3))
        loss = engine(**batch(0, 3)).loss
        engine.backward(loss)
    ours = [line for line in said.getvalue().splitlines() if line.startswith("tp_plugin:")]
    return "\n".join(ours), loss.item()


def before_an_exchange(stage: int) -> tuple[str, float]:
    """The memory for an exchange is lacking on rank 1."""
    original, asked, rank = param_view.CollectiveReads.ready, [], dist.get_rank()

    def ready(self, nbytes):
        asked.append(nbytes)
        return original(self, 1 << 60 if rank == 1 and len(asked) == 5 else nbytes)

    param_view.CollectiveReads.ready = ready
    try:
        return examined(stage)
    finally:
        param_view.CollectiveReads.ready = original


def between_exchanges(stage: int) -> tuple[str, float]:
    """The memory for activations is lacking on rank 1, in the middle of the twin's forward."""
    original, rank = comparison.unsharded_view, dist.get_rank()

    def short_twin(*args):
        made = original(*args)

        def fail(*_):
            raise SHORT

        if rank == 1:
            made.model.layers[1].mlp.register_forward_pre_hook(fail)
        return made

    comparison.unsharded_view = short_twin
    try:
        return examined(stage)
    finally:
        comparison.unsharded_view = original


def after_the_last(stage: int) -> tuple[str, float]:
    """The memory for the loss is lacking on rank 1."""
    rank = dist.get_rank()  # in a plain run a rank is told that of its replica

    def run(model, inputs):
        loss = model(**inputs).loss
        if rank == 1 and not hasattr(model, "tp_sharding"):
            raise SHORT
        return loss

    return examined(stage, run)


def sound(stage: int) -> tuple[str, float]:
    return examined(stage)


CASES = ("sound", "before_an_exchange", "between_exchanges", "after_the_last")


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_a_rank_out_of_memory_keeps_nobody_waiting(name, stage):
    """Four ranks: at ZeRO-3 the other replica would wait too."""
    found = values(launched(4, __name__, CASES, (stage,)), name)
    said = [text for text, _ in found]
    assert said[1:] == ["", "", ""]
    assert ("its loss was not checked" in said[0]) == (name != "sound")
    assert name == "sound" or ("[on rank 1]" in said[0] and "another rank failed" not in said[0])
    expected = [loss for _, loss in values(launched(4, __name__, CASES, (stage,)), "sound")]
    assert [loss for _, loss in found] == expected
