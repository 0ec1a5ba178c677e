"""The trial: equal where sharding is right, and where it is broken on purpose it says what and where."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy
import pytest
import torch
from transformers import AutoConfig

from tp_plugin.config import TensorParallelConfig
from tp_plugin.layers import RowParallelLinear
from tp_plugin.layers.region import Region
from tp_plugin.model_check.check import check
from tp_plugin.model_check.parity import LIMITS, run
from tp_plugin.model_check.resolve_model import architectures, class_named, config_for
from tp_plugin.model_check.tiny_model import TinyModel


def checked(model_type: str, tp: int = 2, plan: dict[str, str] | None = None):
    model_class = class_named(architectures()[model_type][1])
    config = config_for(model_class, AutoConfig.for_model(model_type))
    return check(model_class, config, TensorParallelConfig(tp_size=tp, quiet=True, plan=plan or {}))


@pytest.mark.parametrize(("model_type", "tp"), [("llama", 2), ("qwen3", 4)])
def test_what_is_right_is_equal(model_type, tp):
    found = checked(model_type, tp)
    assert found.parity.verdict == "equal", found.parity.sentence
    assert all(found.parity.errors[name] <= limit for name, limit in LIMITS.items())
    assert max(found.parity.errors.values()) > 0, "a single figure may be equal to the bit, all of them never are"
    assert found.full.fraction < 1.05 / tp
    assert found.full.mean <= found.full.fraction


def test_a_door_left_out_is_caught(monkeypatch):
    """The input gradient of the columns is then only this rank's part of it."""
    monkeypatch.setattr(Region, "attach_input", lambda self, column: None)
    found = checked("llama").parity
    assert found.verdict == "differs"
    assert found.errors["loss"] <= LIMITS["loss"]
    assert found.errors["gradient"] > 1e-2
    assert "every output agrees, the gradient of 'model.layers.1.post_attention_layernorm' differs" in found.sentence


def test_a_sum_left_out_is_caught_and_the_row_named(monkeypatch):
    monkeypatch.setattr(
        RowParallelLinear, "forward", lambda self, x: torch.nn.functional.linear(x, self.weight, self.bias)
    )
    found = checked("llama").parity
    assert found.verdict == "differs"
    assert "the output of 'model.layers.0.self_attn.o_proj' (row, HF plan) differs first" in found.sentence


def test_a_partial_gradient_that_is_not_summed_is_caught(monkeypatch):
    """Qwen3's q_norm and k_norm act on the rank's own heads."""
    monkeypatch.setattr("tp_plugin.sharding.apply_plan.sum_partial_gradient", lambda param, mesh: None)
    found = checked("qwen3").parity
    assert found.verdict == "differs"
    assert found.worst.endswith("_norm.weight")
    assert "the gradient of 'model.layers.1.self_attn.k_norm' (partial, HF plan) differs first in backward" in (
        found.sentence
    )


def test_a_plan_that_does_not_fit_is_refused():
    found = checked("llama", plan={"model.layers.*.mlp.down_proj": "replicated"})
    assert found.parity.verdict == "refused"
    assert "needs at least one column and exactly one row" in found.parity.sentence
    assert found.full.refused


def test_a_forward_that_fails_names_the_module(monkeypatch):
    def forward(self, x):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(RowParallelLinear, "forward", forward)
    found = checked("llama").parity
    assert found.verdict == "broken"
    assert "'model.layers.0.self_attn.o_proj' (row, HF plan) sharded: RuntimeError: on purpose" in found.sentence


class Drawing(torch.nn.Module):
    """Draws from NumPy as it is made, and from Python in its forward, as a custom model with LayerDrop may."""

    def __init__(self, _config):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.from_numpy(numpy.random.rand(4)).float())

    def forward(self, input_ids, labels=None):
        x = input_ids.float().mean() * self.weight
        for _ in range(16):
            x = x * 2 if random.random() < 0.5 else x + 1
        return SimpleNamespace(loss=x.sum(), logits=x[None])


def test_what_is_drawn_from_numpy_and_python_is_drawn_alike_in_every_run():
    before = numpy.random.get_state()[1].tolist(), random.getstate()
    specimen = TinyModel(Drawing, None)
    first, second = specimen.build(), specimen.build()
    assert torch.equal(first.weight, second.weight)
    assert (numpy.random.get_state()[1].tolist(), random.getstate()) == before
    inputs = {"input_ids": torch.ones(1, 2)}
    assert run(first, inputs).loss == run(second, inputs).loss
