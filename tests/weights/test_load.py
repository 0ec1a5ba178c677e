"""from_pretrained: to the bit what transformers loads and shard_model cuts, and only what a rank holds is read."""

from __future__ import annotations

import functools
import traceback

import pytest

import tp_plugin
from tests.support import moe, odd_checkpoints, zoo
from tests.support.batched_cases import launched, values
from tests.support.loaded import assert_same, readers
from tests.support.matrix import LIMITS, assert_within, run_cases
from tests.support.models import FAMILIES, make
from tests.support.ranks import on_ranks
from tests.support.sliced import both, folder_for, held

MODELS = (*FAMILIES, *zoo.ZOO, *moe.SIZES, *moe.MORE)


def equal(name: str) -> None:
    """One model of the zoo, tied and packed and converted as it is."""
    model = zoo.build(name) if name in zoo.ZOO else make(name)
    with folder_for(model) as folder:
        with readers() as opened:
            whole, ours = both(type(model), folder, tp_plugin.TensorParallelConfig(tp_size=2, infer="trusted"))
        assert_same(whole, ours)
        (reader,) = opened
        assert reader.bytes_read == held(ours), f"{reader.bytes_read} bytes were read"


def each(function, names) -> dict[str, str]:
    """``function`` of every name; "" or what it raised."""
    found = {}
    for name in names:
        try:
            function(name)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc(limit=-4)
    return found


def all_equal():
    return each(equal, MODELS)


@functools.cache
def equality():
    return on_ranks(2, all_equal, timeout_s=600)


@pytest.mark.parametrize("name", MODELS)
def test_equals_loading_the_whole_and_sharding_it(name):
    assert [found[name] for found in equality()] == ["", ""]


# ---- what may be odd about a checkpoint ------------------------------------------------------------------------------


ODD = (
    "many_files", "cast_to_bfloat16", "bfloat16_as_saved", "kept_in_fp32", "a_pickle", "a_pickle_of_tied",
    "both_of_tied_and_equal", "both_of_tied_and_different", "only_the_head_of_tied", "without_the_base_prefix",
    "with_the_base_prefix", "a_new_classification_head", "parameters_missing", "a_new_head_that_is_tied",
    "nothing_of_what_is_tied", "vocabulary_started_anew", "of_the_hub", "info_is_returned_too",
    "from_config_under_zero3", "two_models_under_zero3", "generation_config", "a_rank_alone",
    "rules_that_were_inferred",
)  # fmt: skip
WIDE = ("kv_heads_on_several_ranks", "seeded_differently")


@pytest.mark.parametrize("name", ODD)
def test_an_odd_checkpoint_is_loaded_as_transformers_does(name):
    values(launched(2, odd_checkpoints.__name__, ODD), name)


@pytest.mark.parametrize("name", WIDE)
def test_four_ranks_load_their_slices(name):
    values(launched(4, odd_checkpoints.__name__, WIDE), name)


# ---- training --------------------------------------------------------------------------------------------------------

CASES: dict[tuple[int, int], list[dict]] = {
    (2, 2): [
        *[{"family": "Qwen3", "stage": stage, "way": "load", "heads": (6, 3)} for stage in (0, 1, 2, 3)],
        {"family": "Mixtral", "stage": 1, "way": "load"},
        {"family": "gpt2", "stage": 3, "way": "load"},
        {"family": "Llama", "stage": 3, "way": "zero3 order"},
        {"family": "Qwen2", "stage": 3, "way": "zero3 order", "tied": True},
        {"family": "Qwen2Moe", "stage": 3, "way": "zero3 order", "gradients": False},
        {"family": "t5", "stage": 3, "way": "zero3 order"},
    ],
    (4, 2): [
        {"family": "Qwen3", "stage": 3, "way": "zero3 order"},
        {"family": "Llama", "stage": 2, "way": "load", "tied": True},
    ],
    (4, 4): [
        {"family": "Qwen2", "stage": 3, "way": "zero3 order", "heads": (8, 2)},
        {"family": "Llama", "stage": 1, "way": "load", "heads": (4, 1)},
    ],
}


@functools.cache
def trained(world: int, tp: int) -> list:
    return on_ranks(world, run_cases, tp, CASES[world, tp], timeout_s=600)


PARAMETERS = [(world, tp, index) for (world, tp), cases in CASES.items() for index in range(len(cases))]


@pytest.mark.parametrize(("world", "tp", "index"), PARAMETERS, ids=lambda value: str(value))
def test_what_was_loaded_by_slices_trains_like_one_process(world, tp, index):
    assert_within(LIMITS, [results[index] for results in trained(world, tp)])
