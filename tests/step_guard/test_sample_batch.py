"""Which piece of a batch the guard of the first step computes again."""

from __future__ import annotations

import pytest
import torch

from tp_plugin.step_guard.sample_batch import LENGTH, MARGIN, ROWS, copied, sample_batch

WIDE = 4096


def batch(rows=8, length=WIDE, first=0, **more):
    """Rows whose labels begin at ``first``, which may be one place a row; ids say where a position was."""
    firsts = torch.as_tensor(first).expand(rows)
    ids = torch.arange(length).expand(rows, length)
    labels = torch.where(ids < firsts[:, None], -100, ids)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **more}


def learned(piece):
    return (piece["labels"][:, 1:] != -100).any(1).all()


def test_rows_and_positions_are_few():
    piece = sample_batch(batch())
    assert {value.shape for value in piece.values()} == {(ROWS, LENGTH)}
    assert piece["input_ids"][0, 0] == 0


@pytest.mark.parametrize("first", [300, 3000, WIDE - 1, (300, 3000, *6 * (40,))])
def test_what_is_learned_late_is_among_them(first):
    piece = sample_batch(batch(first=first))
    assert learned(piece)
    assert piece["input_ids"].shape[1] <= LENGTH or isinstance(first, tuple)
    assert torch.equal(piece["input_ids"][piece["labels"] != -100], piece["labels"][piece["labels"] != -100])


def test_rows_in_which_something_is_learned_go_first():
    piece = sample_batch(batch(first=torch.tensor([WIDE, WIDE, 5, WIDE, 9, 3, 3, 3])))
    assert learned(piece)
    assert sample_batch(batch(first=WIDE))["labels"].shape == (ROWS, LENGTH), "nothing is learned anywhere"


def test_completions_are_looked_for_as_labels_are():
    mask = (torch.arange(WIDE) >= 900).long().expand(8, WIDE)
    given = {
        "input_ids": torch.arange(WIDE).expand(8, WIDE),
        "attention_mask": torch.ones(8, WIDE),
        "completion_mask": mask,
    }
    assert sample_batch(given)["completion_mask"].any(1).all()


def test_numbers_of_pairs_are_cut_with_their_pairs():
    piece = sample_batch(batch(ref_chosen_logps=torch.arange(4.0), ref_rejected_logps=torch.arange(4.0)))
    assert piece["labels"].shape == (ROWS, LENGTH)
    assert piece["ref_chosen_logps"].tolist() == [0.0]


@pytest.mark.parametrize("first", [0, 700])
def test_packed_sequences_keep_their_beginnings(first):
    begins = torch.tensor([0, 100, 350, 2000, WIDE], dtype=torch.int32)
    places = torch.cat([torch.arange(int(n)) for n in begins.diff()])[None]
    packed = {"cu_seq_lens_q": begins, "cu_seq_lens_k": begins, "max_length_q": 2096, "max_length_k": 2096}
    piece = sample_batch(batch(1, first=first, position_ids=places, **packed))
    stop = piece["input_ids"].shape[1]
    assert stop == max(LENGTH, first + MARGIN if first else 0)
    assert piece["cu_seq_lens_q"].tolist() == [begin for begin in begins.tolist() if begin < stop] + [stop]
    assert piece["cu_seq_lens_q"].dtype == torch.int32
    assert piece["max_length_q"] == int(piece["cu_seq_lens_q"].diff().max())
    assert learned(piece)


def test_calls_are_cut_by_position_and_by_name():
    given = batch()
    ids = given.pop("input_ids")
    piece = sample_batch({"args": (ids,), "kwargs": given})
    assert piece["args"][0].shape == piece["kwargs"]["labels"].shape == (ROWS, LENGTH)
    assert sample_batch({"args": (), "kwargs": batch()})["kwargs"]["input_ids"].shape == (ROWS, LENGTH)
    both = {"args": (ids, ids), "kwargs": {}}
    assert sample_batch(both)["args"][0].shape == ids.shape, "nobody knows what the second one is"


def test_what_it_does_not_know_it_leaves_whole():
    pictures = batch(pixel_values=torch.zeros(3, 3, 8, 8))
    assert sample_batch(pictures)["labels"].shape == (8, WIDE)
    assert sample_batch(batch(token_weights=torch.zeros(8, 17)))["labels"].shape == (ROWS, WIDE)


def test_a_copy_can_be_written_into():
    given = {"args": (torch.zeros(2),), "kwargs": {"x": torch.zeros(2), "y": [torch.zeros(2)]}}
    made = copied(given)
    for tensor in (made["args"][0], made["kwargs"]["x"], made["kwargs"]["y"][0]):
        tensor += 1
    assert not any(tensor.any() for tensor in (given["args"][0], given["kwargs"]["x"], given["kwargs"]["y"][0]))
