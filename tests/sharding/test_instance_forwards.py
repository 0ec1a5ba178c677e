"""Forwards that were patched before sharding: on an instance they lead to the sharded layer's, or are refused."""

from __future__ import annotations

import pytest

from tests.support.batched_cases import launched, sentence, values

MODULE = "tests.sharding.patched"
EQUAL = ["kept_on_adapters", "kept_on_adapters_unguarded", "kept_on_linears", "wrapped_all", "replaced_column"]
CASES = (*EQUAL, "replaced_row", "patched_attention", "patched_attention_unguarded")


@pytest.mark.parametrize("name", EQUAL)
def test_a_forward_on_an_instance_leads_to_the_sharded_layers(name):
    for sharded, plain in values(launched(2, MODULE, CASES), name):
        assert sharded == pytest.approx(plain, rel=1e-5)


def test_a_forward_that_hides_the_sharded_layers_is_refused_by_name():
    refused = sentence(launched(2, MODULE, CASES), "replaced_row")
    assert "'model.layers.0.self_attn.o_proj' has a forward set on the instance" in refused


def test_a_forward_that_takes_heads_from_the_config_is_refused_by_name():
    refused = sentence(launched(2, MODULE, CASES), "patched_attention")
    assert refused.startswith("'model.layers.0.self_attn' fails on a rank's shard, which has 2 of 4 heads")
    assert "is invalid for input of size" in refused


def test_and_without_the_guard_its_error_says_so():
    for failure, notes in values(launched(2, MODULE, CASES), "patched_attention_unguarded"):
        assert "is invalid for input of size" in failure
        assert len(notes) == 1
        assert "'model.layers.0.self_attn' fails on a rank's shard, which has 2 of 4 heads" in notes[0]
