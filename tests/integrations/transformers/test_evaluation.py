"""How transformers weighs the loss of an evaluation, with tensor parallelism and without (docs/troubleshooting.md).

A replica's loss is its sum over the tokens of the whole batch, times the replicas; it is repeated for each of its rows,
and what is beyond the data is cut off. So tokens count alike within a batch of all replicas, rows alike between
batches, and rows that fill up the last batch count among its tokens.
"""

from __future__ import annotations

import functools
import os
import tempfile

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

import tp_plugin
from tests.support import tiny
from tests.support.ranks import on_ranks
from tests.support.trainer_cases import config_of, model_of
from tests.support.trainer_data import DATA, padded

TP, DP, ROWS = 2, 2, 2  # rows of a replica's batch
SAMPLES = (24, 22)


def evaluated() -> list[float]:
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    tp_plugin.register()
    arguments = TrainingArguments(
        tempfile.mkdtemp(), deepspeed=config_of(3), per_device_eval_batch_size=ROWS, report_to="none", disable_tqdm=True
    )
    trainer = Trainer(model=model_of("causal"), args=arguments, data_collator=padded)
    return [trainer.evaluate(DATA["plain"](samples))["eval_loss"] for samples in SAMPLES]


@functools.cache
def found() -> list[list[float]]:
    return on_ranks(TP * DP, evaluated)


@functools.cache
def sums(samples: int) -> list[tuple[float, int]]:
    """Loss and number of labelled tokens of each row."""
    model, rows = model_of("causal").eval(), []
    for index in range(samples):
        row = tiny.Samples(samples)[index]
        with torch.no_grad():
            logits = model(input_ids=row["input_ids"][None]).logits[0, :-1]
        labels = row["labels"][1:]
        rows.append((float(F.cross_entropy(logits, labels, reduction="sum")), int((labels != -100).sum())))
    return rows


def weighted(samples: int, replicas: int, rows: int) -> float:
    """The mean as transformers forms it."""
    losses: list[float] = []
    for start in range(0, samples, replicas * rows):
        batch = [sums(samples)[n % samples] for n in range(start, start + replicas * rows)]  # filled from the beginning
        tokens = sum(count for _, count in batch)
        for replica in range(replicas):
            own = sum(loss for loss, _ in batch[replica * rows : (replica + 1) * rows])
            losses += [own * replicas / tokens] * rows
    return sum(losses[:samples]) / samples


@pytest.mark.parametrize("index", range(len(SAMPLES)), ids=map(str, SAMPLES))
def test_an_evaluation_is_weighted_as_transformers_does(index):
    for rank in found():
        assert rank[index] == pytest.approx(weighted(SAMPLES[index], DP, ROWS), rel=1e-5)


def test_the_same_batches_in_one_process_give_the_same_where_rows_divide():
    assert found()[0][0] == pytest.approx(weighted(24, 1, DP * ROWS), rel=1e-5)


def test_another_number_of_replicas_gives_another_loss():
    """By tenths of a percent, though no row or token is left out."""
    other = abs(found()[0][0] / weighted(24, 1, ROWS) - 1)
    filled = abs(found()[0][1] / weighted(22, 1, DP * ROWS) - 1)
    assert 1e-4 < other < 0.02
    assert 1e-4 < filled < 0.02
