"""Data sets and the collator of the trainings with HF Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.support import tiny


class Rows(torch.utils.data.Dataset):
    """``count`` samples, made of those of :class:`tiny.Samples`."""

    def __init__(self, count: int, make: Callable[[int, dict], dict] = lambda _, row: row) -> None:
        self.samples, self.make = tiny.Samples(count), make

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.make(index, self.samples[index])


def uneven(index: int, row: dict) -> dict:
    return {name: column[: 4 + (5 * index) % 9] for name, column in row.items()}


def augmented(_index: int, row: dict) -> dict:
    """The last token is drawn anew each time, in the process that loads it."""
    row["input_ids"][-1] = int(torch.randint(tiny.VOCAB, ()))
    return row


def masked(_index: int, row: dict) -> dict:
    """Words to be guessed are drawn anew each time, as a collator of masked language modeling draws them."""
    hidden = torch.rand(row["input_ids"].shape) < 0.3
    hidden[1] = True
    return {"input_ids": row["input_ids"].masked_fill(hidden, 5), "labels": row["input_ids"].masked_fill(~hidden, -100)}


def one_class(index: int, row: dict) -> dict:
    return row | {"labels": torch.tensor(index % 3)}


def token_classes(_index: int, row: dict) -> dict:
    return row | {"labels": row["input_ids"] % 3}


def unlabelled(*wholly: int) -> Callable[[int], Rows]:
    """Rows of which those numbered so have no label."""
    return lambda count: Rows(
        count, lambda index, row: row | ({"labels": torch.full_like(row["labels"], -100)} if index in wholly else {})
    )


DATA: dict[str, Callable[[int], Any]] = {
    "stream": tiny.Stream,
    **{make.__name__: lambda count, make=make: Rows(count, make) for make in (uneven, augmented, masked, one_class)},
    "token_classes": lambda count: Rows(count, token_classes),
    "plain": Rows,
    # a step without a label, then one data-parallel rank of two without; or the first step, which the guard examines
    "unlabelled": unlabelled(4, 5, 6, 7, 8, 9),
    "unlabelled_first": unlabelled(0, 1, 2, 3),
}


def padded(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    for row in rows:
        row["attention_mask"] = torch.ones_like(row["input_ids"])
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        name: torch.nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=fill[name])
        if column[0].dim()
        else torch.stack(column)
        for name, column in columns.items()
    }
