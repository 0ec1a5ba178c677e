"""The guard runs a loss several times: state is put back, and a model that the loss holds gives way to the twin."""

from __future__ import annotations

import functools

import pytest

from tests.integrations.transformers import attention, holding, stateful
from tests.support.batched_cases import run_all, values
from tests.support.guarded_trainer import DEEPSPEED, UNCHECKED
from tests.support.ranks import on_ranks
from tp_plugin.step_guard.differences import TRAINERS_LOSS

HOMES = (stateful.__name__, holding.__name__, attention.__name__)
REST = ["never_the_same", "shard_in_a_closure", "backward_inside"]
CASES = [*stateful.STATE, *holding.HOLDS, *REST, *attention.ATTENTION, "attention_counts"]


@functools.cache
def launched():
    return on_ranks(2, run_all, HOMES, CASES, (), env=DEEPSPEED, timeout_s=300)


def compared(found, outputs=("logits",)):
    assert UNCHECKED not in found["said"]
    assert {TRAINERS_LOSS, *outputs} <= found["seen"].keys()
    assert max(value for name, value in found["seen"].items() if "coarse" not in name) < 1e-5
    assert len(found["losses"]) == stateful.STEPS


@pytest.mark.parametrize("name", stateful.STATE)
def test_state_is_put_back_between_the_runs_and_after(name):
    for found in values(launched(), name):
        compared(found)
        if name == "generators":
            # what the guard's runs appended is gone, and so are their draws
            assert found["kept"]["calls"] == found["kept"]["truth"]
        elif name == "bank":
            assert found["kept"]["calls"] == [2, 2, 2.25]
        else:
            calls = found["kept"]["calls"]
            assert calls == 2 or set(calls) == {2}


@pytest.mark.parametrize("name", holding.HOLDS)
def test_a_model_that_the_loss_holds_gives_way_to_the_twin(name):
    for found in values(launched(), name):
        compared(found)
        assert found["kept"].get("engine", True), "what the trainer put into its loss is there in training"


def test_a_loss_that_is_another_each_time_is_said_to_be_unchecked():
    first, second = values(launched(), "never_the_same")
    assert first["said"].count(UNCHECKED) == 1
    assert "computed twice in the same way it is another, the trainer's loss" in first["said"]
    assert UNCHECKED not in second["said"]
    assert len(first["losses"]) == stateful.STEPS


def test_a_shard_that_a_loss_has_kept_is_caught():
    for refused in values(launched(), "shard_in_a_closure"):
        assert "without tensor parallelism differs: the trainer's loss" in refused


def test_a_loss_may_go_backward_through_its_own_part():
    for found in values(launched(), "backward_inside"):
        compared(found)


@pytest.mark.parametrize("name", attention.ATTENTION)
def test_an_attention_function_of_ones_own_is_the_same_in_both_runs(name):
    for rank, found in enumerate(values(launched(), name)):
        compared(found)
        assert found["kept"]["chosen"] not in ("sdpa", "eager")
        assert ("coarse logits" in found["seen"]) == ("bf16" in name)
        if name == "attention_asks":
            ranks_own = (2 * rank, 2 * rank + 1)
            assert {heads.total for heads in found["kept"]["heads"]} == {4}
            # those of the twin are all, and what the guard noted is put back
            assert {heads.numbers for heads in found["kept"]["heads"]} == {ranks_own}


def test_an_attention_function_that_counts_heads_is_refused_with_what_to_ask():
    for refused in values(launched(), "attention_counts"):
        assert "without tensor parallelism differs: the trainer's loss" in refused
        assert "without the attention function 'counts_heads' both agree" in refused
        assert "tp_plugin.attention_heads" in refused
        assert "if the loss reads weights" not in refused
