"""The small copy keeps what sharding depends on."""

from __future__ import annotations

import copy

import pytest
from transformers import AutoConfig

from tp_plugin.model_check.check import on_meta
from tp_plugin.model_check.resolve_model import architectures, class_named, config_for, configs_in
from tp_plugin.model_check.shrink_config import PRIMES, shrunk_config

TYPES = ("llama", "qwen3", "gemma2", "mixtral", "deepseek_v3", "falcon", "t5", "bert", "whisper", "qwen2_vl", "jamba")


def config_of(model_type: str):
    model_class = class_named(architectures()[model_type][1])
    return model_class, config_for(model_class, AutoConfig.for_model(model_type))


@pytest.mark.parametrize("model_type", TYPES)
def test_small_and_of_the_same_shape(model_type):
    model_class, config = config_of(model_type)
    before = copy.deepcopy(config).to_dict()
    small = shrunk_config(config)
    assert config.to_dict() == before, "the config given was changed"
    assert sum(q.numel() for q in on_meta(model_class, small).parameters()) < 60_000_000
    for full, part in zip(configs_in(config), configs_in(small), strict=True):
        for name, value in vars(full).items():
            if "heads" in name or isinstance(value, bool):
                assert vars(part)[name] == value, name


def test_widths_keep_their_ratios():
    _, config = config_of("llama")
    small = shrunk_config(config)
    assert small.head_dim == 8
    assert small.hidden_size == small.head_dim * small.num_attention_heads == 256
    assert small.intermediate_size * config.hidden_size == config.intermediate_size * small.hidden_size
    assert small.vocab_size in PRIMES


def test_every_kind_of_layer_is_in_the_copy():
    _, config = config_of("gemma2")
    assert set(shrunk_config(config).layer_types) == set(config.layer_types)
    _, config = config_of("gemma3")
    text = config.get_text_config()
    assert set(shrunk_config(config).get_text_config().layer_types) == set(text.layer_types)


def test_experts_keep_their_groups():
    _, config = config_of("deepseek_v3")
    small = shrunk_config(config)
    assert small.n_group == config.n_group
    assert small.n_routed_experts % small.n_group == 0
    assert small.num_experts_per_tok < small.n_routed_experts < config.n_routed_experts


def test_special_tokens_stay_apart_and_inside_the_vocabulary():
    _, config = config_of("qwen2_vl")
    small = shrunk_config(config)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = [getattr(small, name) for name in names]
    assert len(set(ids)) == 4
    assert max(ids) < small.get_text_config().vocab_size


def test_nothing_is_dropped_at_random():
    _, config = config_of("bert")
    small = shrunk_config(config)
    assert small.hidden_dropout_prob == small.attention_probs_dropout_prob == 0
