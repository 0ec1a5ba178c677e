"""Exports that fail on one rank: the earlier one is as it was, and nobody waits."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import core_model_loading

import tp_plugin
from tests.support.configs import config_for
from tests.support.exports import packed, steps, wide
from tests.support.models import make
from tests.support.ranks import on_ranks
from tests.support.train import engine_for, optimizer_for
from tp_plugin.layout import ShardLayout
from tp_plugin.weights import stream


def fails_on_one_rank(model, place, name, failure):
    """An export in which ``place.name`` fails on rank 1 only: the sentence, and what became of the one before it."""
    engine = engine_for(model, optimizer_for(model, "adamw"), config_for(2, 1))
    with tempfile.TemporaryDirectory() as own, pytest.MonkeyPatch.context() as patch:
        shared = [own]
        dist.broadcast_object_list(shared)
        folder = Path(shared[0])
        tp_plugin.save_pretrained(engine, folder, max_shard_size="500KB")
        before = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        steps(engine, [0])

        def fail(*args):
            raise failure

        if dist.get_rank() == 1:
            patch.setattr(place, name, fail)
        with pytest.raises(tp_plugin.TensorParallelError) as caught:
            tp_plugin.save_pretrained(engine, folder, max_shard_size="500KB")
        steps(engine, [1])  # the ranks meet in it
        after = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        dist.barrier()
    return str(caught.value), before == after


def writing_fails(failure):
    return fails_on_one_rank(wide(), os, "pwrite", failure)


def converting_fails(failure):
    return fails_on_one_rank(packed(), core_model_loading, "revert_weight_conversion", failure)


def packing_fails(failure):
    """Where rank 0 is the writer, it waits for what rank 1 does not come to send."""
    return fails_on_one_rank(wide(), ShardLayout, "local_rows", failure)


@pytest.mark.parametrize("how", [writing_fails, converting_fails, packing_fails])
@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), RuntimeError("no such failure was thought of")]
)
def test_a_failure_on_one_rank_leaves_the_earlier_export_as_it_was(how, failure):
    found = on_ranks(2, how, failure)
    assert len({sentence for sentence, _ in found}) == 1
    assert f"{failure} [on rank 1]" in found[0][0]
    assert all(untouched for _, untouched in found)


def gathering_fails():
    """In the third bucket, on rank 1 of four: what full_state_dict says on each rank, and whether it works again."""
    found = []
    for stage in (1, 3):
        model = make("Llama", tied=False)
        engine = engine_for(model, optimizer_for(model, "adamw"), config_for(2, stage))
        packed, rows = [], ShardLayout.local_rows

        def run_out(layout, *args, packed=packed, rows=rows):
            packed.append(layout)
            if len(packed) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has too little.")
            return rows(layout, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stream, "BUCKET", 4 << 10)
            if dist.get_rank() == 1:
                patch.setattr(ShardLayout, "local_rows", run_out)
            with pytest.raises(tp_plugin.TensorParallelError) as caught:
                tp_plugin.full_state_dict(engine)
        steps(engine, [0])
        state = tp_plugin.full_state_dict(engine)
        found.append((str(caught.value), len(state) > 0))
    return found


def test_a_rank_without_memory_to_gather_is_not_waited_for():
    found = on_ranks(4, gathering_fails, timeout_s=120)
    says = "gathering the full tensors failed: OutOfMemoryError: CUDA out of memory [on rank 1] [on ranks 0, 1]"
    for rank, results in enumerate(found):
        assert results == [(says, rank == 0)] * 2
