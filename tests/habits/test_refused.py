"""Habits of public loops that are refused on every rank, or that accelerate's DeepSpeed leaves without effect."""

from __future__ import annotations

import re

import pytest

from tests.habits.refused import ALLOWED, REFUSED
from tests.support.batched_cases import launched, values

NAMES = tuple(function.__name__ for function in (*REFUSED, *ALLOWED))
WHAT = {function.__name__: (kind, text) for function, (kind, text) in REFUSED.items()}


def found() -> list[dict]:
    return launched(4, "tests.habits.refused", NAMES)


@pytest.mark.parametrize("name", WHAT)
def test_is_refused_on_every_rank(name):
    kind, text = WHAT[name]
    for rank in found():
        assert rank[name][0] == kind, rank[name]
        assert re.search(text, rank[name][1]), rank[name][1]


def test_a_norm_that_nobody_asked_for_is_said_once():
    for said in values(found(), "asks_for_nothing"):
        assert len(said) == 1
        assert "clipped at the norm 1, which the loop does not ask for" in said[0]


def test_gradients_are_gone_after_backward():
    assert values(found(), "changes_gradients") == [[0]] * 4


def test_a_communication_hook_changes_nothing():
    assert values(found(), "compresses") == [0.0] * 4


def test_prompts_are_dealt_to_groups_and_collected_once():
    assert (
        values(found(), "infers")
        == [([0, 10, 20], [0, 10, 20, 30, 40])] * 2 + [([30, 40, 40], [0, 10, 20, 30, 40])] * 2
    )


def test_accelerates_own_tensor_parallelism_is_not_there():
    assert values(found(), "follows_the_parallelism_config") == [(None, None)] * 4
