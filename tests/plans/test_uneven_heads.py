"""Heads that tp does not fit, dealt unevenly where the user says so: three ranks, two key/value heads."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.batched_cases import launched, sentence, values
from tests.support.configs import config_for
from tests.support.guarded import compared
from tests.support.matrix import LIMITS, assert_within
from tests.support.models import batch, make
from tests.support.ranks import on_ranks
from tests.support.train import compare, engine_for, optimizer_for

TP = 3
HERE = __name__
UNEVEN = {"tp_plugin": {"quiet": True, "check_batch_every": 2, "uneven_heads": True}}
CASES: list[dict[str, Any]] = [
    *({"family": "Llama", "heads": (16, 2), "stage": stage} for stage in (0, 1, 3)),
    {"family": "Qwen3", "heads": (4, 2), "tied": True, "stage": 3},
    {"family": "phi3", "stage": 1},
    {"family": "GptOss", "heads": (4, 2), "stage": 1},
    {"family": "Llama", "heads": (16, 2), "stage": 1, "adapter": "every linear"},
]


def parity() -> list[tuple[dict[str, float], int]]:
    """By case: the errors, and how many numbers the guard compared."""
    found = []
    for case in CASES:
        seen: dict[str, float] = {}
        with compared(seen):
            found.append((compare(tp=TP, extra=UNEVEN, **case), len(seen)))
    return found


@functools.cache
def parities():
    return on_ranks(TP, parity, timeout_s=400)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_uneven_heads_train_equal_to_one_process(case):
    found = [results[CASES.index(case)] for results in parities()]
    assert_within(LIMITS, [errors for errors, _ in found])
    assert all(numbers >= 2 for _, numbers in found), "the guard of the first step compared nothing"


def plain() -> Any:
    return make("Llama", heads=(16, 2))


def engine() -> Any:
    model = plain()
    config = config_for(TP, 1, **UNEVEN)
    return engine_for(model, optimizer_for(model, "adamw"), config)


def generates() -> dict[str, Any]:
    """Tokens of one process and of these ranks, and the heads in a rank's cache, by way."""
    one, ours = plain().eval(), engine().module.eval()
    found = {}
    for way, options in {"greedy": {}, "sampling": {"do_sample": True, "top_k": 20}, "beam": {"num_beams": 3}}.items():
        made = []
        for model in (one, ours):
            torch.manual_seed(11)
            length = {"max_new_tokens": 6, "min_new_tokens": 6, "no_repeat_ngram_size": 1}
            ids = batch(0, 2)["input_ids"]
            made.append(model.generate(ids, return_dict_in_generate=True, **length, **options))
        tokens = [each.sequences.tolist() for each in made]
        found[way] = tokens[0] == tokens[1], made[1].past_key_values.layers[0].keys.shape[1]
    return found


def is_saved() -> tuple[float, float, float]:
    """Differences of the loss here, after loading a checkpoint, and of what plain transformers loads."""
    import tp_plugin

    ours = engine()
    ours.backward(ours(**batch(0, 2)).loss)
    ours.step()
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    with torch.no_grad():
        here = ours.module(**batch(1, 2)).loss
        tp_plugin.save_pretrained(ours, f"{folder[0]}/whole")
        ours.save_checkpoint(f"{folder[0]}/checkpoint")
        for param in ours.module.parameters():
            param.zero_()
        ours.load_checkpoint(f"{folder[0]}/checkpoint")
        again = ours.module(**batch(1, 2)).loss
        whole = type(plain()).from_pretrained(f"{folder[0]}/whole")(**batch(1, 2)).loss
    return float(here), float(again), float(whole)


def is_offered() -> None:
    model = plain()
    engine_for(model, optimizer_for(model, "adamw"), config_for(TP, 1))


def too_few() -> None:
    model = make("Llama", heads=(2, 1))
    engine_for(model, optimizer_for(model, "adamw"), config_for(TP, 1, **UNEVEN))


CALLS = ("generates", "is_saved", "is_offered", "too_few")


@functools.cache
def calls():
    return launched(TP, HERE, CALLS)


def test_uneven_heads_generate_the_tokens_of_one_process():
    found = values(calls(), "generates")
    assert [rank["greedy"] for rank in found] == [(True, 6), (True, 5), (True, 5)]
    assert all(same for rank in found for same, _ in rank.values())


def test_uneven_heads_are_saved_whole_and_resumed():
    for here, again, whole in values(calls(), "is_saved"):
        assert again == here
        assert abs(whole / here - 1) < 1e-6


def test_the_sentence_that_refuses_offers_them():
    said = sentence(calls(), "is_offered")
    assert "16 query and 2 key/value heads cannot be sharded 3 ways" in said
    assert 'set "uneven_heads": true in the tp_plugin block, which gives the ranks 6, 5, 5 of the query heads' in said


def test_a_rank_without_a_head_is_refused():
    said = sentence(calls(), "too_few")
    assert "2 query and 1 key/value heads cannot be sharded 3 ways" in said
    assert "uneven_heads" not in said
