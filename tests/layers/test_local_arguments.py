"""What becomes a rank's own of what a forward reads: a view of the config, heads of an argument."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import Phi3Config

from tp_plugin.errors import TensorParallelError
from tp_plugin.layers.local_arguments import LocalConfig, set_local, slice_heads


class Reader(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.num_heads = config, 4

    def forward(self, x, alibi=None):
        return alibi


def test_a_view_of_the_config_is_the_config_but_for_what_is_local():
    config = Phi3Config(num_attention_heads=4, num_key_value_heads=2)
    one, other = Reader(config), Reader(config)
    set_local(one, "config.num_attention_heads", 2)
    set_local(one, "config.num_key_value_heads", 1)
    set_local(one, "num_heads", 2)
    assert (one.config.num_attention_heads, one.config.num_key_value_heads, one.num_heads) == (2, 1, 2)
    assert (config.num_attention_heads, other.config.num_attention_heads, other.num_heads) == (4, 4, 4)
    config.attention_dropout = 0.5
    assert one.config.attention_dropout == 0.5, "what is set later on the config must be seen"
    one.config.use_cache = False
    assert config.use_cache is False
    with pytest.raises(AttributeError):
        _ = one.config.no_such_option
    for twin in (copy.deepcopy(one.config), pickle.loads(pickle.dumps(one.config))):
        assert isinstance(twin, LocalConfig)
        assert (twin.num_attention_heads, twin.hidden_size) == (2, config.hidden_size)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.arange(24).view(2 * 4, 1, 3), torch.arange(24).view(2, 4, 1, 3)[:, 2:].reshape(4, 1, 3)),
        (torch.arange(24).view(4, 2, 3), torch.arange(24).view(4, 2, 3)[2:]),
        (torch.arange(24).view(2, 4, 1, 3), torch.arange(24).view(2, 4, 1, 3)[:, 2:]),
        (torch.arange(6).view(2, 1, 1, 3), torch.arange(6).view(2, 1, 1, 3)),
        (None, None),
    ],
)
def test_a_rank_gets_its_heads_of_an_argument(given, expected):
    module = Reader(None)
    slice_heads(module, "alibi", 4, (2, 3))
    for found in (module(0, alibi=given), module(0, given)):
        assert found is None if expected is None else torch.equal(found, expected)


def test_an_argument_that_is_not_what_it_was_is_named():
    module = Reader(None)
    slice_heads(module, "alibi", 4, (2, 3))
    with pytest.raises(TensorParallelError, match="Reader is no longer called with 'alibi'"):
        module(0)
    with pytest.raises(TensorParallelError, match=r"shape \[3, 1, 3\] has no entry for each of 4 heads"):
        module(0, alibi=torch.zeros(3, 1, 3))
