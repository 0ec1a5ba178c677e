"""Trainer's call of ``deepspeed.tp_model_init`` leaves nothing behind in the process."""

import deepspeed
import pytest
import torch
from deepspeed.runtime.tensor_parallel import init_utils

import tp_plugin.integrations.transformers as integration

CONFIG = {"tensor_parallel": {"autotp_size": 2}}


@pytest.fixture
def recorded(monkeypatch):
    """What DeepSpeed has recorded, with our patches on; both are put back."""
    monkeypatch.setattr(init_utils, "_TP_MODEL_INIT_ARGS", None)
    integration.ROOM.install()
    yield lambda: init_utils._TP_MODEL_INIT_ARGS
    integration.ROOM.uninstall()


def test_what_the_config_says_is_not_recorded(recorded):
    model = torch.nn.Linear(1, 1)
    for dtype in (torch.float32, torch.bfloat16):  # DeepSpeed refuses the second: "Conflicting tp_model_init arguments"
        assert deepspeed.tp_model_init(model=model, tp_size=2, dtype=dtype, config=CONFIG) is model
    assert recorded() is None


@pytest.mark.parametrize("config", [None, {}, {"tensor_parallel": {"autotp_size": 4}}])
def test_what_the_config_does_not_say_is_recorded_as_before(recorded, config):
    deepspeed.tp_model_init(torch.nn.Linear(1, 1), 2, torch.float32, config)
    assert recorded()["tp_size"] == 2
