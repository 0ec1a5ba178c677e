"""Texts become blocks: every document once, the same for a seed, made once however many ask."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist

import tp_plugin
from tests.support.ranks import on_ranks
from tests.support.texts import TEXTS
from tp_plugin.errors import TensorParallelError
from tp_plugin.launch.data import blocks
from tp_plugin.launch.finetune import _join


def test_blocks_hold_every_document_once_and_split_without_overlap(texts, tokenizer, tmp_path):
    train, held_out = blocks(texts, tokenizer, seed=0, cache=tmp_path / "cache")
    assert len(held_out) == round(0.1 * (len(train) + len(held_out)))
    row = train[0]
    assert row["input_ids"].shape == row["labels"].shape == (16,)
    assert torch.equal(row["input_ids"], row["labels"])
    stream = torch.cat([part[i]["input_ids"] for part in (train, held_out) for i in range(len(part))])
    documents_seen = tokenizer.decode(stream).split(tokenizer.eos_token)
    assert set(documents_seen[:-1]) <= set(TEXTS)  # the last one may be cut
    assert len(documents_seen[:-1]) == len(set(documents_seen[:-1])) >= len(TEXTS) - 2
    with pytest.raises(IndexError):
        train[len(train)]


def test_blocks_are_the_same_for_a_seed_and_made_once(texts, tokenizer, tmp_path):
    def rows(seed: int, cache: str) -> list:
        return blocks(texts, tokenizer, seed=seed, cache=tmp_path / cache)[0].tokens.tolist()

    assert rows(0, "a") == rows(0, "b") != rows(1, "a")
    (file, _) = sorted((tmp_path / "a").glob("*.npy"), key=lambda path: path.stat().st_mtime)
    numpy.save(file, numpy.full_like(numpy.load(file), 7))
    assert set(map(tuple, rows(0, "a"))) == {(7,) * 16}, "the second call reads what the first one made"
    Path(texts.text_files[0]).with_name("00.txt").write_text("changed")
    rows(0, "a")
    assert len(list((tmp_path / "a").glob("*.npy"))) == 3, "changed text is tokenised anew"


def test_two_writers_of_one_pid_do_not_share_a_file(texts, tokenizer, tmp_path, monkeypatch):
    """As containers on two hosts with one output directory."""
    meeting, save = threading.Barrier(2, timeout=60), numpy.save

    def saved_together(out, array):
        meeting.wait()
        save(out, array)
        meeting.wait()

    monkeypatch.setattr(numpy, "save", saved_together)
    with concurrent.futures.ThreadPoolExecutor(2) as hosts:
        made = [hosts.submit(blocks, texts, tokenizer, seed=0, cache=tmp_path / "cache") for _ in range(2)]
    one, other = (each.result()[0].tokens for each in made)
    assert numpy.array_equal(one, other)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npy"]


def patience() -> float:
    """Of the process group that a recipe's job joins, in hours."""
    tp_plugin.register()  # as finetune does; DeepSpeed would compile its own collectives for CPUs
    state = _join()
    assert state.distributed_type.value == "DEEPSPEED"
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    return backend.options._timeout.total_seconds() / 3600


def test_the_others_wait_for_one_that_tokenises():
    assert on_ranks(1, patience) == [12]


def test_too_little_text_is_refused(texts, tokenizer, tmp_path):
    long = dataclasses.replace(texts, sequence_length=100_000)
    with pytest.raises(TensorParallelError, match=r"the text fills 0 blocks of data.sequence_length 100000"):
        blocks(long, tokenizer, seed=0, cache=tmp_path)
