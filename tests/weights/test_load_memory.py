"""What loading costs: each rank's memory rises by its shard, and all ranks together read the files once."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import pytest
import torch.distributed as dist
import transformers

import tp_plugin
from benchmarks.load_save import Memory, write_checkpoint
from tests.support.loaded import readers
from tests.support.ranks import on_ranks

MIB = 1 << 20
SLACK = 28 * MIB
"""A window of a mapped file, pages that sizes are rounded up to, Python's own objects."""


def loaded(folder: str) -> dict[str, int]:
    """Bytes of a rank: held, read, and how far its resident set rose; likewise for the whole model."""
    tp_plugin.register()
    with readers() as opened, Memory() as memory:
        model = tp_plugin.from_pretrained(folder)
        found = memory.risen()
    found |= {"held": sum(tensor.nbytes for tensor in model.parameters()), "read": opened[0].bytes_read,
              "touched": opened[0].bytes_touched}  # fmt: skip
    del model
    dist.barrier()
    with Memory() as memory:
        whole = transformers.LlamaForCausalLM.from_pretrained(folder)
        copies = [tensor.clone() for tensor in whole.parameters()]  # of what is mapped until it is used
        found["whole"] = memory.risen()["peak"]
    assert sum(copy.nbytes for copy in copies) > 3.9 * found["held"]
    return found


@functools.cache
def measured() -> tuple[int, list[dict[str, int]]]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        sizes = argparse.Namespace(gigabytes=0.16, hidden=1024, vocabulary=8000)
        return write_checkpoint(Path(folder), sizes), on_ranks(4, loaded, folder)


def test_all_ranks_ask_for_the_files_once():
    size, ranks = measured()
    assert sum(rank["read"] for rank in ranks) <= 1.05 * size


def test_a_rank_alone_touches_a_part_of_the_pages():
    """More than it asks for: columns of a matrix lie in nearly all pages of it."""
    size, ranks = measured()
    assert all(rank["read"] < rank["touched"] < 0.5 * size for rank in ranks)


@pytest.mark.parametrize("kind", ["peak", "peak_anonymous"])
def test_the_memory_of_a_rank_rises_by_its_shard(kind):
    size, ranks = measured()
    assert size >= 128 * MIB
    for rank in ranks:
        assert rank["held"] <= 0.26 * size
        # from below only loosely: a process that had memory before uses it again
        assert rank["held"] / 4 < rank[kind] <= rank["held"] + SLACK, rank


def test_loading_the_whole_would_be_seen():
    size, ranks = measured()
    assert all(rank["whole"] >= 0.9 * size for rank in ranks)
